"""The arithmetic of the measurement, on a clock of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import measure


def test_the_time_of_a_call_is_the_elapsed_time_over_the_calls(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def call():
        now[0] += 0.25
        return now[0]

    def wait(last):
        assert last == 102.0  # of eight calls
        now[0] += 0.8

    assert measure._time(call, wait, 8) == pytest.approx(0.35)


def test_an_array_that_is_given_is_taken_as_it_is(monkeypatch):
    monkeypatch.setattr(measure, "ROUND_SECONDS", 0.0)
    seen = []
    index = jnp.asarray([3, 1], jnp.int32)
    measure.measure_us(lambda x, index: jax.debug.callback(seen.append, index), (jax.ShapeDtypeStruct((4,), jnp.float32), index))
    jax.effects_barrier()
    np.testing.assert_array_equal(seen[0], index)


def test_the_bandwidth_of_a_copy_counts_reads_and_writes(monkeypatch):
    monkeypatch.setattr(measure, "measure_us", lambda fn, args: 1000.0)
    assert measure.measure_copy_bandwidth() == pytest.approx(2 * measure.COPY_BYTES / 1e-3)


def test_every_argument_is_filled_and_the_program_runs(monkeypatch):
    monkeypatch.setattr(measure, "ROUND_SECONDS", 0.0)
    seen = []

    def program(tree, index):
        jax.debug.callback(lambda *values: seen.append(values), tree["x"], index)
        return tree["x"][index]

    args = ({"x": jax.ShapeDtypeStruct((4096,), jnp.bfloat16)}, jax.ShapeDtypeStruct((3,), jnp.int32))
    assert measure.measure_us(program, args) > 0
    jax.effects_barrier()
    assert len(seen) == measure.ROUNDS + 2  # and two calls that warm up and choose the length of a round
    x, index = seen[0]
    assert abs(np.std(np.float32(x)) - 1) < 0.1
    assert not np.any(index)
