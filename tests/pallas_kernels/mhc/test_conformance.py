"""An implementation of the seam against float64: outputs and gradients, any n, ragged token counts, edges of the number range.

XLA's here. Interpreted, the kernels take too long for all of it: their own files hold smaller versions of the same checks. On a machine
with an accelerator, name it in IMPLEMENTATIONS.

Tolerances are relative l2 errors. float32: 2e-5, a sum of n*C products. bfloat16: streams are rounded when they are written, to 1.7e-3 in
this norm; coefficients are not, and stay where float32 has them, up to the rounding of the streams that they are predicted from.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import Problem, errors, gradients_of, oracle, problem

from pallas_kernels.mhc import Mapping, mhc_post, mhc_post_pre, mhc_pre, reference, sinkhorn

IMPLEMENTATIONS = ("xla",)
TOLERANCE = {"float32": dict.fromkeys(("stream", "row"), 2e-5), "bfloat16": {"stream": 3e-3, "row": 1e-4}}
STREAMS = {"between", "u", "x", "y"}

MAPPINGS = {
    "paper": Mapping(4),
    "identity": Mapping(4, mixes=False),
    "V4": Mapping(4, norm_eps=1e-6, pre_eps=1e-6, sinkhorn_eps=1e-6),
    "V4.1": Mapping(4, reads="previous"),
    "one step": Mapping(4, sinkhorn_steps=1),
    **{f"n {n}": Mapping(n) for n in (1, 2, 3, 5, 6, 7, 8)},
}


def run(p: Problem, implementation: str):
    """Outputs and gradients by name."""

    def f(x, y, h, weights):
        return mhc_post_pre(x, y, h, weights, p.mapping, implementation=implementation, interpret=implementation != "xla")

    @jax.jit
    def both(*args):
        out, pull = jax.vjp(f, *args)
        return out, pull(p.cotangents)

    (between, u, h), (dx, dy, dh, dw) = both(p.x, p.y, p.h, p.weights)
    return {"between": between, "u": u, "h": h}, {"x": dx, "y": dy, "h": dh, **gradients_of(dw)}


def check(p: Problem, implementation: str, dtype: str) -> None:
    for got, wanted, which in zip(run(p, implementation), oracle(p), ("output", "gradient")):
        for name, error in errors(got, wanted).items():
            limit = TOLERANCE[dtype]["stream" if name in STREAMS else "row"]
            # A gradient that passed through streams of bfloat16 has their rounding in it.
            if dtype == "bfloat16" and which == "gradient":
                limit = 5e-3
            assert error < limit, f"{which} {name}: {error:.2e}"


FAST = [("paper", "bfloat16"), ("identity", "float32"), ("V4", "bfloat16"), ("V4.1", "float32"), ("n 1", "float32"), ("n 8", "bfloat16")]
EVERY = [
    pytest.param(name, dtype, marks=() if (name, dtype) in FAST else pytest.mark.slow)
    for name in MAPPINGS
    for dtype in ("float32", "bfloat16")
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("name", "dtype"), EVERY)
def test_outputs_and_gradients_equal_float64(name, dtype, implementation):
    check(problem(MAPPINGS[name], dtype=jnp.dtype(dtype)), implementation, dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("tokens", [1, 129])
def test_any_number_of_tokens(tokens, implementation):
    check(problem(Mapping(4), tokens=tokens), implementation, "float32")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("logit_std", [0.5, 6.0])
def test_any_scale_of_logits(logit_std, implementation):
    check(problem(Mapping(4), logit_std=logit_std), implementation, "float32")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_sum_to_one_at_the_float32_level_for_bfloat16_streams(implementation):
    p = problem(Mapping(4), tokens=200, dtype=jnp.bfloat16, logit_std=4.0)
    h = np.asarray(run(p, implementation)[0]["h"], np.float64)
    assert np.abs(h[8:].reshape(4, 4, -1).sum(axis=1) - 1).max() < 5e-7


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_projection_has_two_bfloat16_terms_of_phi(implementation):
    """Logits within 2^-16 of their scale: one term would be off by 2^-9. Static streams leave no other rounding."""
    p = problem(Mapping(4), dtype=jnp.bfloat16, logit_std=4.0)
    h = np.zeros_like(p.h)
    h[8:] = np.eye(4).reshape(16, 1)
    p = Problem(p.mapping, p.x, jnp.zeros_like(p.y), jnp.asarray(h), p.weights, p.cotangents)
    got, wanted = run(p, implementation)[0]["h"], oracle(p)[0]["h"]
    assert np.abs(np.asarray(got, np.float64)[:8] - wanted[:8]).max() < 4.0 * 2**-14


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_tokens_of_zeros_are_finite(implementation):
    p = problem(Mapping(4))
    zero = Problem(p.mapping, p.x.at[3].set(0), p.y.at[3].set(0), p.h, p.weights, p.cotangents)
    check(Problem(Mapping(4, norm_eps=1e-6), zero.x, zero.y, zero.h, zero.weights, zero.cotangents), implementation, "float32")
    outputs, _ = run(zero, implementation)
    assert all(np.isfinite(np.asarray(a, np.float64)).all() for a in outputs.values())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_token_that_is_not_finite_spoils_no_other(implementation):
    p = problem(Mapping(4))
    bad = Problem(p.mapping, p.x.at[5, 7].set(jnp.nan), p.y, p.h, p.weights, p.cotangents)
    outputs, gradients = run(bad, implementation)
    wanted = oracle(p)
    assert not np.isfinite(np.asarray(outputs["u"][5])).all()
    others = np.arange(len(p.x)) != 5
    for got, want in zip((outputs, gradients), wanted):
        for name in want.keys() & {"between", "u", "x", "y"}:
            assert np.linalg.norm(np.asarray(got[name])[others] - want[name][others]) < 2e-5 * np.linalg.norm(want[name])
        assert np.linalg.norm(np.asarray(got["h"])[:, others] - want["h"][:, others]) < 2e-5 * np.linalg.norm(want["h"])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["paper", "identity", "V4.1"])
def test_the_seam_is_its_two_halves(name, implementation):
    """post, then pre, have the seam's outputs and gradients."""
    p = problem(MAPPINGS[name])
    how = {"implementation": implementation, "interpret": implementation != "xla"}

    def halves(x, y, h, weights):
        between = mhc_post(x, y, h, p.mapping, **how)
        return between, *mhc_pre(between, weights, p.mapping, h if p.mapping.reads == "previous" else None, **how)

    (between, u, h), pull = jax.vjp(jax.jit(halves), p.x, p.y, p.h, p.weights)
    dx, dy, dh, dw = pull(p.cotangents)
    got = ({"between": between, "u": u, "h": h}, {"x": dx, "y": dy, "h": dh, **gradients_of(dw)})
    for some, wanted in zip(got, oracle(p)):
        assert max(errors(some, wanted).values()) < 2e-5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("n", "eps"), [(2, 0.0), (4, 0.0), (4, 1e-6), (8, 0.0)])
def test_sinkhorn_and_its_gradient_equal_float64(n, eps, implementation):
    logits = 3 * np.random.default_rng(0).standard_normal((n, n, 70)).astype(np.float32)
    d = np.random.default_rng(1).standard_normal(logits.shape).astype(np.float32)
    with jax.enable_x64(True):
        wanted, pull = jax.vjp(lambda z: reference.sinkhorn(z, 20, eps), jnp.asarray(logits, jnp.float64))
        wanted, d_wanted = np.asarray(wanted), np.asarray(pull(jnp.asarray(d, jnp.float64))[0])
    how = {"implementation": implementation, "interpret": implementation != "xla"}
    got, pull = jax.vjp(lambda z: sinkhorn(z, 20, eps, **how), jnp.asarray(logits))
    # float32 keeps an exponential of 10 to 1e-6, and 20 steps of it.
    assert np.abs(np.asarray(got) - wanted).max() < 2e-5
    assert np.abs(np.asarray(pull(jnp.asarray(d))[0]) - d_wanted).max() < 5e-5
