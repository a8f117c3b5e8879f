"""GPU kernels, run on a Hopper GPU or interpreted on the CPU, against float64, and lowered for Hopper. Nothing here is timed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gates import check, gate, run
from hopper import INTERPRET, in_the_interpreter, on_hopper

from pallas_kernels.engram_gate import gpu
from pallas_kernels.engram_gate.cases import FIRST, cases
from pallas_kernels.engram_gate.gpu import rows
from pallas_kernels.gpu import launch
from pallas_kernels.static_cost import lower_for

BF16, F32 = jnp.bfloat16, jnp.float32


@pytest.mark.parametrize(
    ("n", "tokens", "width", "dtype"),
    [(1, 3, 128, F32), pytest.param(4, 5, 384, BF16, marks=pytest.mark.slow), pytest.param(8, 2, 256, BF16, marks=pytest.mark.slow)],
)
def test_the_gate_equals_float64(n, tokens, width, dtype):
    check(gate(n, tokens, width, dtype), "gpu", INTERPRET)


@on_hopper
@pytest.mark.parametrize(("width", "dtype"), [(2560, BF16), (1280, F32)])
def test_thousands_of_tokens_equal_float64(width, dtype):
    check(gate(4, 4133, width, dtype), "gpu", INTERPRET)


@in_the_interpreter
@pytest.mark.slow
def test_programs_that_walk_over_tokens_refill_their_buffers_without_races(monkeypatch):
    """Two programs for 15 tokens, more than are under way at once, and one of the two takes the last token again.

    The interpreter of jax 0.12 follows what happens before what, and raises. A token that is written twice has the same values twice.
    """
    interpreter = launch._interpreter
    monkeypatch.setattr(launch, "_interpreter", lambda: dataclasses.replace(interpreter(), detect_races=True))
    monkeypatch.setattr(rows, "MULTIPROCESSORS", 1)
    check(gate(2, 7, 128, BF16), "gpu", INTERPRET)
    monkeypatch.setattr(launch, "_interpreter", interpreter)
    monkeypatch.setattr(rows, "MULTIPROCESSORS", 2)
    check(gate(2, 15, 128, BF16), "gpu", INTERPRET)


def test_a_token_that_is_not_finite_spoils_no_other():
    g = gate(2, 4, 128)
    bad = dataclasses.replace(g, streams=g.streams.at[1, 7].set(jnp.nan))
    kept = np.array([0, 2, 3])
    for got, wanted in zip(run(bad, "gpu", INTERPRET), run(g, "gpu", INTERPRET)):
        for name in got.keys() & {"out", "streams", "keys_value"}:
            np.testing.assert_array_equal(np.asarray(got[name])[kept], np.asarray(wanted[name])[kept])


@pytest.mark.parametrize("chip", ["H100", pytest.param("B200", marks=pytest.mark.slow)])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_first_case_lowers_to_one_kernel(direction, chip):
    """Layouts and shared memory are checked by JAX; wgmma is not used, so Blackwell can be compiled for."""
    case = next(c for c in cases() if c.kernel == "gate_add" and c.direction == direction and c.name == f"t{FIRST[0]}_n4_c{FIRST[1]}")
    assert lower_for(chip, *case.build("gpu")).as_text().count("@mosaic_gpu") == 1


@pytest.mark.parametrize(
    ("n", "width", "dtype"),
    [(1, 128, F32), *(pytest.param(*shape, marks=pytest.mark.slow) for shape in ((3, 384, BF16), (8, 1152, BF16), (2, 2560, F32)))],
)
def test_any_number_of_streams_lowers(n, width, dtype):
    def array(*shape, kind=F32):
        return jax.ShapeDtypeStruct(shape, kind)

    streams, keys_value = (array(65, k * width, kind=dtype) for k in (n, n + 1))

    def both(streams, keys_value, gain, d_out, d_alpha):

        _, _, saved = gpu.gate_add(streams, keys_value, gain, 1e-6)
        return gpu.gate_add_backward(streams, keys_value, gain, saved, d_out, d_alpha)

    lowered = lower_for("H100", both, (streams, keys_value, array(n, width), streams, array(n, 65)))
    assert lowered.as_text().count("@mosaic_gpu") == 2
