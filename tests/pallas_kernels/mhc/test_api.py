"""Bad input gets one message that says what would fit; float64 runs end to end; the maths against an oracle that shares nothing with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import mhc as numpy_oracle
from problems import problem

from pallas_kernels import choose as choosing
from pallas_kernels.mhc import Mapping, Weights, mhc_post, mhc_post_pre, mhc_pre, reference, sinkhorn
from pallas_kernels.mhc.choose import choose


def test_the_reference_equals_the_numpy_oracle(float64):
    n, width, tokens = 4, 6, 5
    rng = np.random.default_rng(0)
    phi, alpha, bias = rng.standard_normal((24, n * width)), rng.standard_normal(3), rng.standard_normal(24)
    x, mix = rng.standard_normal((tokens, n * width)), rng.standard_normal((width, width))
    weights = numpy_oracle.Weights(
        phi[:n].T, phi[n : 2 * n].T, phi[2 * n :].T, bias[:n], bias[n : 2 * n], bias[2 * n :].reshape(n, n), *alpha
    )
    mapping = Mapping(n)
    u, h = reference.mhc_pre(jnp.asarray(x), Weights(*map(jnp.asarray, (phi, alpha, bias))), mapping)
    got = reference.mhc_post(jnp.asarray(x), jnp.tanh(u @ mix), h, mapping)
    for t in range(tokens):
        streams = x[t].reshape(n, width)
        pre, post, res = numpy_oracle.coefficients(streams, weights, 20, 1e-20)
        wanted = numpy_oracle.sublayer(streams, lambda u: np.tanh(u @ mix), pre, post, res)
        assert np.abs(np.asarray(got[t]).reshape(n, width) - wanted).max() < 1e-12
        assert np.abs(np.asarray(h[:, t]) - np.concatenate([pre, post, res.reshape(-1)])).max() < 1e-12


def test_float64_streams_are_computed_in_float64(float64):
    p = problem(Mapping(3), width=5)
    args = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), (p.x, p.y, p.h, p.weights))
    for got, wanted in zip(mhc_post_pre(*args, p.mapping), reference.mhc_post_pre(*args, p.mapping)):
        assert np.abs(np.asarray(got) - np.asarray(wanted)).max() < 1e-13


BAD = {
    "x of three axes": (lambda p: (p.x[None], p.y, p.h, p.weights), r"flat streams \[T, n\*C\]"),
    "a width that n does not divide": (lambda p: (p.x[:, :-1], p.y, p.h, p.weights), "multiple of n = 4"),
    "integers": (lambda p: (p.x.astype(jnp.int32), p.y, p.h, p.weights), "bfloat16 or float32"),
    "y of another width": (lambda p: (p.x, p.y[:, 1:], p.h, p.weights), r"y is float32 \(40, 127\); float32 \(40, 128\) is needed"),
    "y of another type": (lambda p: (p.x, p.y.astype(jnp.bfloat16), p.h, p.weights), "y is bfloat16"),
    "h of another number of rows": (lambda p: (p.x, p.y, p.h[:8], p.weights), r"h is float32 \(8, 40\); float32 \(24, 40\)"),
    "h in bfloat16": (lambda p: (p.x, p.y, p.h.astype(jnp.bfloat16), p.weights), "h is bfloat16"),
    "phi in bfloat16": (lambda p: (p.x, p.y, p.h, p.weights._replace(phi=p.weights.phi.astype(jnp.bfloat16))), r"weights\.phi is bfloat16"),
    "two gates": (lambda p: (p.x, p.y, p.h, p.weights._replace(alpha=p.weights.alpha[:2])), r"weights\.alpha is float32 \(2,\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_named(name):
    p = problem(Mapping(4))
    change, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        mhc_post_pre(*change(p), p.mapping)


def test_an_implementation_that_cannot_run_here_names_those_that_can():
    p = problem(Mapping(4))
    with pytest.raises(ValueError, match='"tpu" needs a TPU and this is a CPU; use "xla", None'):
        mhc_post(p.x, p.y, p.h, p.mapping, implementation="tpu")
    with pytest.raises(ValueError, match="known ones are xla, tpu, gpu"):
        mhc_post(p.x, p.y, p.h, p.mapping, implementation="triton")


def test_a_width_that_kernels_cannot_take_says_what_would_fit():
    p = problem(Mapping(4), width=96)
    with pytest.raises(ValueError, match='C is 96; the kernels need a multiple of 128; implementation "xla" takes any size'):
        mhc_post(p.x, p.y, p.h, p.mapping, implementation="tpu", interpret=True)


@pytest.mark.parametrize(
    ("target", "mapping", "width", "chosen"),
    [
        (("gpu", "NVIDIA H100 80GB HBM3"), Mapping(8, sinkhorn_steps=28), 128, "gpu"),
        (("gpu", "NVIDIA H100 80GB HBM3"), Mapping(8, sinkhorn_steps=29), 128, "xla"),  # more sums than shared memory holds
        (("gpu", "NVIDIA A100"), Mapping(4), 128, "xla"),
        (("tpu", "TPU v5"), Mapping(8), 1280, "tpu"),
        (("tpu", "TPU v5"), Mapping(8), 12800, "xla"),  # wider than VMEM
        (("tpu", "TPU v5"), Mapping(4), 96, "xla"),
        (("cpu", "cpu"), Mapping(4), 128, "xla"),
    ],
)
def test_without_a_name_what_kernels_cannot_take_goes_to_xla(monkeypatch, target, mapping, width, chosen):
    monkeypatch.setattr(choosing, "target", lambda: target)
    streams = jax.ShapeDtypeStruct((256, mapping.n * width), jnp.float32)
    assert choose(streams, mapping, None, False).name == chosen


def test_options_out_of_range_are_refused():
    for options, message in (
        ({"n": 9}, "1 to 8"),
        ({"n": 0}, "1 to 8"),
        ({"n": 4, "sinkhorn_steps": 0}, "at least 1"),
        ({"n": 4, "reads": "next"}, "own"),
    ):
        with pytest.raises(ValueError, match=message):
            Mapping(**options)
    p = problem(Mapping(4))
    with pytest.raises(ValueError, match="if and only if"):
        mhc_pre(p.x, p.weights, p.mapping, p.h)
    with pytest.raises(ValueError, match="if and only if"):
        mhc_pre(p.x, p.weights, Mapping(4, reads="previous"))
    with pytest.raises(ValueError, match="tokens last"):
        sinkhorn(jnp.zeros((5, 4, 4)))
