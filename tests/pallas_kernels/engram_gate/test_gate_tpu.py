"""The TPU kernels, interpreted, against the specification in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gates import check, gate, run
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.engram_gate.tpu import forward
from pallas_kernels.tpu import tiles

BF16, F32 = jnp.bfloat16, jnp.float32
V6E = tiles.Chip(generation=6, vmem=128 * tiles.MIB, mxu=256)


@pytest.mark.parametrize(
    ("n", "tokens", "width", "dtype"), [(1, 5, 128, BF16), (4, 130, 256, BF16), pytest.param(2, 300, 128, F32, marks=pytest.mark.slow)]
)
def test_the_gate_equals_float64(n, tokens, width, dtype):
    check(gate(n, tokens, width, dtype), "tpu")


@pytest.mark.slow
@pytest.mark.parametrize("conv", [False, True])
def test_groups_of_sixteen_tokens(conv, monkeypatch):
    """As on v6e and tpu7x."""
    monkeypatch.setattr(tiles, "chip", lambda: V6E)
    check(gate(2, 200, 128, BF16, conv), "tpu")


def test_a_token_that_is_not_finite_spoils_no_other_and_zeros_have_gradients():
    g = gate(2, 140, 128)
    bad = type(g)(g.streams.at[5, 7].set(jnp.nan).at[9].set(0), g.keys_value.at[9].set(0), g.gain, g.conv, g.cotangents)
    kept = ~np.isin(np.arange(140), [5, 9])
    for got, wanted in zip(run(bad, "tpu"), run(g, "tpu")):
        for name in got.keys() & {"out", "streams", "keys_value"}:
            np.testing.assert_array_equal(np.asarray(got[name])[kept], np.asarray(wanted[name])[kept])
            assert np.isfinite(np.asarray(got[name])[9]).all()


@pytest.mark.parametrize(
    ("n", "tokens", "width", "dtype", "one_document"),
    [
        (2, 300, 128, BF16, True),
        pytest.param(1, 5, 128, F32, False, marks=pytest.mark.slow),
        pytest.param(4, 600, 256, F32, False, marks=pytest.mark.slow),
    ],
)
def test_the_gate_with_convolution_equals_float64(n, tokens, width, dtype, one_document):
    """Over more than one tile, and where both cores begin in the middle of a document."""
    check(gate(n, tokens, width, dtype, conv=True, one_document=one_document), "tpu")


@pytest.mark.parametrize("conv", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_tiles_of_fewer_tokens_than_lanes(conv, monkeypatch):
    """As where wide streams leave VMEM no room for more. The forward pass needs 128 tokens, and gets its memory."""
    token_tile, chosen = tiles.token_tile, []

    def narrow(tokens, per_token, fixed, chip, most, least):
        chosen.append(token_tile(tokens, per_token, fixed, chip, 64 if least < 128 else most, least))
        return chosen[-1]

    monkeypatch.setattr(tiles, "token_tile", narrow)
    check(gate(2, 200, 128, BF16, conv), "tpu")
    assert chosen == [256, 64] * 2  # whether they fit, and then the kernels


@pytest.mark.parametrize("conv", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_memories_and_races(conv):
    """With a TPU's memories, DMAs and semaphores imitated, uninitialised memory NaN, and races looked for; the last tile is ragged."""
    check(gate(1, 300, 128, BF16, conv=conv), "tpu", pltpu.InterpretParams(detect_races=True))


@pytest.mark.slow
def test_a_value_that_is_not_finite_stays_within_the_reach_of_its_document():
    """What the convolution must not see may be anything: the NaN of a token is not multiplied by zero."""
    g = gate(2, 140, 128, conv=True)
    reach, bad = np.asarray(g.conv.reach), 30
    document = np.arange(140) - reach  # by its first token
    broken = dataclasses.replace(g, keys_value=g.keys_value.at[bad, 256:].set(jnp.nan))
    others = document != document[bad]
    for got, wanted in zip(run(broken, "tpu"), run(g, "tpu")):
        for name in got.keys() & {"out", "streams", "keys_value"}:
            np.testing.assert_array_equal(np.asarray(got[name])[others], np.asarray(wanted[name])[others])


def test_what_does_not_fit_into_vmem_says_so():
    arrays = [jax.ShapeDtypeStruct(shape, F32) for shape in ((128, 8 * 8192), (128, 9 * 8192), (8, 8192))]
    with pytest.raises(ValueError, match="MiB of VMEM"):
        jax.eval_shape(lambda *a: forward.gate_add(*a, 1e-6), *arrays)
