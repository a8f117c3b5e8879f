"""XLA's implementation against float64 for any shape, the edges of the number range, and one message for each bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gates import NORM_EPS, check, gate, oracle, run

from pallas_kernels import choose as choosing
from pallas_kernels.engram_gate import gate_add, gate_conv_add
from pallas_kernels.engram_gate.choose import choose

BF16, F32 = jnp.bfloat16, jnp.float32


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize(
    ("n", "tokens", "width", "dtype"),
    [
        (1, 1, 5, F32),
        (2, 12, 128, BF16),
        *(pytest.param(*shape, marks=pytest.mark.slow) for shape in ((4, 33, 96, F32), (8, 20, 128, BF16))),
    ],
)
def test_xla_equals_float64(n, tokens, width, dtype, conv):
    check(gate(n, tokens, width, dtype, conv), "xla")


@pytest.mark.parametrize("conv", [False, True])
def test_tokens_of_zeros_have_finite_gradients(conv):
    """Streams, keys and value of zeros: a score of zero, and no slope."""
    g = gate(2, 12, 128, conv=conv)
    zero = type(g)(g.streams.at[3].set(0), g.keys_value.at[3].set(0).at[5, :256].set(0), g.gain, g.conv, g.cotangents)
    for arrays in run(zero, "xla"):
        assert all(np.isfinite(np.asarray(a)).all() for a in arrays.values())
    if not conv:
        check(zero, "xla")


def test_a_document_does_not_see_the_one_before():
    g = gate(2, 30, 128, conv=True)
    first = np.flatnonzero(np.asarray(g.conv.reach) == 0)[-1]
    other = gate(2, 30, 128, conv=True, seed=1)
    changed = g.keys_value.at[:first].set(other.keys_value[:first])
    kept = oracle(g)[0]["out"]
    for implementation in ("xla",):
        got = run(type(g)(g.streams, changed, g.gain, g.conv, g.cotangents), implementation)[0]["out"]
        np.testing.assert_allclose(got[first:], kept[first:], rtol=1e-4, atol=1e-4)
        assert np.abs(np.asarray(got[:first]) - kept[:first]).max() > 0.1


BAD = {
    "streams of three axes": (lambda g: (g.streams[None], g.keys_value, g.gain), r"streams have shape .*; \[T, n\*C\] is needed"),
    "streams of another width": (lambda g: (g.streams[:, 1:], g.keys_value, g.gain), r"that is \[T, 256\]"),
    "integers": (lambda g: (g.streams.astype(jnp.int32), g.keys_value, g.gain), "bfloat16 or float32"),
    "keys without a value": (
        lambda g: (g.streams, g.keys_value[:, :256], g.gain),
        r"keys_value is float32 \(12, 256\); float32 \(12, 384\)",
    ),
    "keys of another type": (lambda g: (g.streams, g.keys_value.astype(BF16), g.gain), "keys_value is bfloat16"),
    "a flat gain": (lambda g: (g.streams, g.keys_value, g.gain.reshape(-1)), r"gain has shape \(256,\); \[n, C\]"),
    "nine streams": (lambda g: (g.streams, g.keys_value, jnp.ones((9, 128))), "1 to 8 streams"),
    "a gain in bfloat16": (lambda g: (g.streams, g.keys_value, g.gain.astype(BF16)), "gain is bfloat16"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_named(name):
    change, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        gate_add(*change(gate(2, 12, 128)), norm_eps=NORM_EPS)


BAD_CONV = {
    "weight": (lambda c: c._replace(weight=c.weight[:3]), r"conv\.weight is float32 \(3, 2, 128\); float32 \(4, 2, 128\)"),
    "gain": (lambda c: c._replace(gain=c.gain.astype(BF16)), r"conv\.gain is bfloat16"),
    "reach": (lambda c: c._replace(reach=c.reach.astype(F32)), r"conv\.reach is float32 \(12,\); int32 \(12,\)"),
}


@pytest.mark.parametrize("name", BAD_CONV)
def test_what_of_the_convolution_does_not_fit_is_named(name):
    change, message = BAD_CONV[name]
    g = gate(2, 12, 128, conv=True)
    with pytest.raises(ValueError, match=message):
        gate_conv_add(g.streams, g.keys_value, g.gain, change(g.conv), norm_eps=NORM_EPS)


def test_an_implementation_that_cannot_run_says_what_can():
    g = gate(2, 12, 96, conv=True)
    args = (g.streams, g.keys_value, g.gain)
    with pytest.raises(ValueError, match='"tpu" needs a TPU and this is a CPU; use "xla", None'):
        gate_add(*args, norm_eps=NORM_EPS, implementation="tpu")
    with pytest.raises(ValueError, match='C is 96; the kernels need a multiple of 128; implementation "xla" takes any size'):
        gate_add(*args, norm_eps=NORM_EPS, implementation="tpu", interpret=True)
    g = gate(2, 12, 128, conv=True)
    with pytest.raises(ValueError, match='the GPU kernels have no convolution; implementation "xla"'):
        gate_conv_add(g.streams, g.keys_value, g.gain, g.conv, norm_eps=NORM_EPS, implementation="gpu", interpret=True)
    wide, gain = [jax.ShapeDtypeStruct((3, k * 5120), BF16) for k in (4, 5)], jax.ShapeDtypeStruct((4, 5120), F32)
    with pytest.raises(ValueError, match="a token of 4 streams of width 5120 needs 300 KiB of shared memory"):
        jax.eval_shape(lambda *a: gate_add(*a, norm_eps=NORM_EPS, implementation="gpu", interpret=True), *wide, gain)


@pytest.mark.parametrize(
    ("target", "width", "dtype", "without", "with_conv"),
    [
        (("tpu", "TPU v5"), 4096, F32, "tpu", "tpu"),
        (("tpu", "TPU v5"), 4480, F32, "tpu", "xla"),  # with convolution more than VMEM holds
        (("tpu", "TPU v5"), 5120, F32, "xla", "xla"),
        (("tpu", "TPU v5"), 5120, BF16, "tpu", "tpu"),
        (("tpu", "TPU v5"), 96, F32, "xla", "xla"),
        (("gpu", "NVIDIA H100 80GB HBM3"), 2560, BF16, "gpu", "xla"),
        (("gpu", "NVIDIA H100 80GB HBM3"), 5120, BF16, "xla", "xla"),
        (("cpu", "cpu"), 128, F32, "xla", "xla"),
    ],
)
def test_without_a_name_what_kernels_cannot_take_goes_to_xla(monkeypatch, target, width, dtype, without, with_conv):
    monkeypatch.setattr(choosing, "target", lambda: target)
    streams, gain = jax.ShapeDtypeStruct((256, 4 * width), dtype), jax.ShapeDtypeStruct((4, width), F32)
    assert [choose(streams, gain, None, False, conv=conv).name for conv in (False, True)] == [without, with_conv]


def test_alpha_is_a_sum_of_nothing_where_no_one_asks_for_it():
    """Gradients without a cotangent for alpha are those of the streams alone."""
    g = gate(2, 12, 128)
    got = jax.grad(lambda h: jnp.vdot(gate_add(h, g.keys_value, g.gain, norm_eps=NORM_EPS)[0], g.cotangents[0]))(g.streams)
    wanted = oracle(type(g)(g.streams, g.keys_value, g.gain, None, (g.cotangents[0], jnp.zeros_like(g.cotangents[1]))))[1]["streams"]
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
