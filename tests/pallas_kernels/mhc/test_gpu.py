"""GPU kernels, run on a Hopper GPU or interpreted on the CPU, copies and barriers included, against float64. Nothing here is timed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper import INTERPRET, in_the_interpreter, on_hopper
from problems import Problem, errors, gradients_of, oracle, problem

from pallas_kernels.gpu import launch
from pallas_kernels.mhc import Mapping, gpu, mhc_post_pre, mhc_pre, reference, sinkhorn
from pallas_kernels.mhc.gpu import backward, forward, tokens

# Relative l2 errors. float32: a sum of n*C products. bfloat16: streams are rounded when they are written, 1.7e-3 in this norm, and what a
# gradient or coefficient is made of may have been rounded to the neighbour of what the oracle has.
TOLERANCE = {jnp.float32: 2e-5, jnp.bfloat16: 5e-3}
# Few Sinkhorn steps: each is dozens of calls for the interpreter.
V41, V4 = Mapping(2, sinkhorn_steps=4, reads="previous"), Mapping(1, sinkhorn_steps=4, norm_eps=1e-6, pre_eps=1e-6, sinkhorn_eps=1e-6)


@functools.cache
def compiled(mapping: Mapping):
    def both(x, y, h, weights, cotangents):
        out, pull = jax.vjp(lambda *a: mhc_post_pre(*a, mapping, implementation="gpu", interpret=INTERPRET), x, y, h, weights)
        return out, pull(cotangents)

    return jax.jit(both)


def run(p: Problem):
    """Outputs and gradients by name."""
    (between, u, h), (dx, dy, dh, dw) = compiled(p.mapping)(p.x, p.y, p.h, p.weights, p.cotangents)
    return {"between": between, "u": u, "h": h}, {"x": dx, "y": dy, "h": dh, **gradients_of(dw)}


def check(p: Problem) -> None:
    for got, wanted in zip(run(p), oracle(p)):
        for name, error in errors(got, wanted).items():
            assert error < TOLERANCE[p.x.dtype.type], f"{name}: {error:.2e}"


@pytest.mark.parametrize(
    ("mapping", "count", "dtype"),
    [
        (V41, 7, jnp.float32),
        pytest.param(Mapping(4, mixes=False), 70, jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param(V4, 5, jnp.float32, marks=pytest.mark.slow),
        pytest.param(Mapping(4), 64, jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param(Mapping(4), 100, jnp.float32, marks=pytest.mark.slow),
        pytest.param(Mapping(8, mixes=False, reads="previous"), 3, jnp.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_the_seam_equals_float64(mapping, count, dtype):
    check(problem(mapping, tokens=count, dtype=dtype))


@on_hopper
@pytest.mark.parametrize(
    ("mapping", "dtype"), [(Mapping(4), jnp.bfloat16), (Mapping(4, reads="previous"), jnp.bfloat16), (Mapping(4), jnp.float32)]
)
def test_the_published_width_equals_float64_and_two_runs_give_the_same_bits(mapping, dtype):
    p = problem(mapping, tokens=4133, width=2560, dtype=dtype)
    check(p)
    for first, second in zip(run(p), run(p)):
        assert all(np.array_equal(first[name], second[name]) for name in first)


def test_a_token_that_is_not_finite_spoils_no_other_and_zeros_are_finite():
    p = problem(V41, tokens=7)
    bad = Problem(p.mapping, p.x.at[5, 7].set(jnp.nan).at[2].set(0), p.y.at[2].set(0), p.h, p.weights, p.cotangents)
    outputs, gradients = run(bad)
    assert not np.isfinite(np.asarray(outputs["u"][5])).all()
    assert all(np.isfinite(np.asarray(outputs[name][2])).all() for name in ("between", "u"))
    others = np.array([0, 1, 3, 4, 6])
    for got, wanted in zip((outputs, gradients), oracle(p)):
        for name in wanted.keys() & {"between", "u", "x", "y"}:
            assert np.linalg.norm(np.asarray(got[name])[others] - wanted[name][others]) < 2e-5 * np.linalg.norm(wanted[name])
        assert np.linalg.norm(np.asarray(got["h"])[:, others] - wanted["h"][:, others]) < 2e-5 * np.linalg.norm(wanted["h"])


@pytest.mark.slow
def test_pre_and_its_gradient_equal_float64():
    p = problem(V4, tokens=70)

    def both(implementation, p):
        interpret = INTERPRET and implementation == "gpu"
        out, pull = jax.vjp(lambda x, w: mhc_pre(x, w, p.mapping, implementation=implementation, interpret=interpret), p.x, p.weights)
        return out, pull(p.cotangents[1:])

    got = jax.jit(lambda x, weights: both("gpu", dataclasses.replace(p, x=x, weights=weights)))(p.x, p.weights)
    with jax.enable_x64(True):
        x, weights, cotangents = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), (p.x, p.weights, p.cotangents))
        wanted = both("xla", dataclasses.replace(p, x=x, weights=weights, cotangents=cotangents))
    for a, b in zip(jax.tree.leaves(got), map(np.asarray, jax.tree.leaves(wanted))):
        assert np.linalg.norm(np.asarray(a) - b) < 2e-5 * np.linalg.norm(b)


@in_the_interpreter
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_long_pipelines_refill_their_buffers_without_races(dtype, monkeypatch):
    """On a machine of one multiprocessor a program has more steps than stages. The projection is of two terms of phi.

    The interpreter of jax 0.12 follows what happens before what, stores included, and raises. Whole tiles: tokens in two tiles are
    written twice, with the same values.
    """
    interpreter = launch._interpreter
    monkeypatch.setattr(launch, "_interpreter", lambda: dataclasses.replace(interpreter(), detect_races=True))
    monkeypatch.setattr(forward, "MULTIPROCESSORS", 1)
    monkeypatch.setattr(backward, "MULTIPROCESSORS", 1)
    n, count, width = 2, 128, 640
    p = problem(Mapping(n, mixes=False), tokens=count, width=width, dtype=dtype)
    assert width // forward.plan(count, width, lambda c: c * 1024, lambda c: 0).chunk > 4
    out = forward.stream(p.x, p.y, n, post=p.h[n:], phi=p.weights.phi, interpret=INTERPRET)
    between, sums = out["between"], out["sums"]
    x, y, h, phi, d = (np.asarray(a, np.float64) for a in (p.x, p.y, p.h, p.weights.phi, p.cotangents[0]))
    wanted = (x.reshape(count, n, width) + h[n:].T[:, :, None] * y[:, None]).reshape(count, -1)
    assert errors({"a": between}, {"a": wanted})["a"] < TOLERANCE[dtype]
    seen = np.asarray(between, np.float64)
    raw = phi @ seen.T
    assert np.abs(np.asarray(sums[:-1]) - raw).max() < 2**-14 * np.abs(raw).max()
    np.testing.assert_allclose(sums[-1], (seen**2).sum(axis=1), rtol=1e-5)
    got = backward.stream(p.x, p.y, p.cotangents[0], None, n, post=p.h[n:], interpret=INTERPRET)
    d = d.reshape(count, n, width)
    wanted = {"x": d.reshape(count, -1), "y": np.einsum("it,tic->tc", h[n:], d), "gates": np.einsum("tic,tc->it", d, y)}
    for name, error in errors(got, wanted).items():
        assert error < TOLERANCE[dtype], name


@pytest.mark.slow
def test_eight_float32_streams_have_the_gradient_of_phi_all_the_same():
    """Shared memory has no room for it; XLA multiplies."""
    n, count = 8, 70
    p = problem(Mapping(n), tokens=count)
    rng = np.random.default_rng(1)
    g, shrink = (jnp.asarray(rng.standard_normal((k, count)), jnp.float32) for k in (p.mapping.rows, 1))
    coefficients = {"post": p.h[n : 2 * n], "res": p.h[2 * n :], "pre": p.h[:n], "phi": p.weights.phi, "g": g, "shrink": shrink}
    d_phi = backward.stream(p.x, p.y, *p.cotangents[:2], n, **coefficients, interpret=INTERPRET)["phi"]
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(a, np.float64)) for a in (p.x, p.y, p.h)]
        wanted = np.asarray(g, np.float64) @ np.asarray(reference.mhc_post(*wide, p.mapping))
    assert errors({"phi": d_phi}, {"phi": wanted})["phi"] < 2e-5


@pytest.mark.parametrize(("eps", "steps"), [(0.0, 20), (1e-6, 4)])
def test_sinkhorn_and_its_gradient_equal_float64(eps, steps):
    rng = np.random.default_rng(0)
    logits, d = 3 * rng.standard_normal((2, 2, 200)).astype(np.float32), rng.standard_normal((2, 2, 200)).astype(np.float32)
    with jax.enable_x64(True):
        wanted, pull = jax.vjp(lambda z: reference.sinkhorn(z, steps, eps), jnp.asarray(logits, jnp.float64))
        wanted, d_wanted = np.asarray(wanted), np.asarray(pull(jnp.asarray(d, jnp.float64))[0])
    assert np.abs(np.asarray(gpu.sinkhorn(logits, steps, eps, interpret=INTERPRET)) - wanted).max() < 2e-5
    assert np.abs(np.asarray(gpu.sinkhorn_backward(logits, d, steps, eps, interpret=INTERPRET)) - d_wanted).max() < 5e-5


def test_more_sinkhorn_steps_than_shared_memory_has_room_for_are_refused():
    logits = jnp.zeros((8, 8, 3))
    with pytest.raises(ValueError, match="at most 28 steps with 8 streams"):
        sinkhorn(logits, 200, implementation="gpu", interpret=INTERPRET)


@pytest.mark.parametrize("count", [1, 64, 65, 200])
def test_tiles_come_back_as_they_were_and_each_token_counts_once(count):
    rows = jnp.arange(3.0 * count).reshape(3, count)
    tiles = tokens.tiled(rows)
    np.testing.assert_array_equal(tokens.untiled(tiles, count), rows)
    assert tokens.first_time(count).sum() == count
    np.testing.assert_array_equal((tiles * tokens.first_time(count)).sum(axis=(0, 2)), rows.sum(axis=1))
