"""The TPU's forward kernels, interpreted, against the specification in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from problems import problem

from pallas_kernels.mhc import reference
from pallas_kernels.mhc.spec import Mapping, Weights
from pallas_kernels.mhc.tpu import forward
from pallas_kernels.mhc.tpu.sinkhorn import sinkhorn, sinkhorn_backward
from pallas_kernels.tpu import tiles

BF16 = 2.0**-9  # the largest relative error of rounding to bfloat16; in relative l2 about half of it
V6E = tiles.Chip(generation=6, vmem=128 * tiles.MIB, mxu=256)


def run(f, *args):
    return jax.jit(f)(*args)


def wide(tree):
    return jax.tree.map(lambda a: a.astype(jnp.float64), tree)


def seam(p, interpret=True):
    return run(lambda *args: forward.post_pre(*args, p.mapping, interpret=interpret), p.x, p.y, p.h, p.weights)


def oracle(p, between):
    """Float64: the exact streams between, and u, h and saved from the streams as they were written."""
    mapping = p.mapping
    with jax.enable_x64(True):
        x, y, h, weights, between = wide((p.x, p.y, p.h, p.weights, between))
        exact = reference.mhc_post(x, y, h, mapping)
        u, h_next = reference.mhc_pre(between, weights, mapping, h)
        inverse_rms = 1 / jnp.sqrt(jnp.mean(between**2, axis=1) + mapping.norm_eps)
        saved = jnp.concatenate([weights.phi @ between.T * inverse_rms[None], inverse_rms[None]])
        return jax.tree.map(np.asarray, (exact, u, h_next, saved))


def error(got, wanted):
    """Relative l2."""
    return np.linalg.norm(np.asarray(got, np.float64) - wanted) / np.linalg.norm(wanted)


def assert_close(got, wanted, dtype):
    rounding = BF16 if dtype == "bfloat16" else 1e-6
    tolerances = (rounding, rounding + 1e-5, 2e-5, 2e-5)
    for name, a, b, tolerance in zip(("between", "u", "h", "saved"), got, wanted, tolerances):
        assert error(a, b) < tolerance, name


@pytest.mark.parametrize(
    ("mapping", "tokens", "dtype", "std"),
    [
        (Mapping(1), 5, "bfloat16", 1.0),
        (Mapping(2), 130, "float32", 0.5),
        (Mapping(4, norm_eps=1e-6, pre_eps=1e-6, sinkhorn_eps=1e-6), 130, "bfloat16", 6.0),
        (Mapping(4, mixes=False), 128, "bfloat16", 3.0),
        (Mapping(2, reads="previous"), 128, "bfloat16", 1.0),
    ],
    ids=str,
)
def test_seam(mapping, tokens, dtype, std):
    p = problem(mapping, tokens, 128, jnp.dtype(dtype), std)
    got = seam(p)
    assert_close(got, oracle(p, got[0]), dtype)


@pytest.mark.parametrize("reads", ["own", "previous"])
def test_parts_make_the_seam(reads):
    mapping = Mapping(2, reads=reads)
    p = problem(mapping, 128, 256, jnp.bfloat16)
    between = run(lambda *args: forward.post(*args, mapping, interpret=True), p.x, p.y, p.h)
    got = run(lambda x, w, h: forward.pre(x, w, mapping, h, interpret=True), between, p.weights, p.h)
    wanted = oracle(p, between)
    assert_close((between, *got), wanted, "bfloat16")


def test_eight_streams():
    """Their products are deeper than a matrix unit of 128."""
    p = problem(Mapping(8), 128, 128, jnp.bfloat16, 3.0)
    between = run(lambda *args: forward.post(*args, p.mapping, interpret=True), p.x, p.y, p.h)
    assert error(between, oracle(p, between)[0]) < BF16


def test_wide_matrix_unit_and_tokens_that_are_not_finite(monkeypatch):
    """With groups of 16 tokens. A token's neighbours must not notice that it is NaN or infinite, and rows of zeros have no rms."""
    monkeypatch.setattr(tiles, "chip", lambda: V6E)
    p = problem(Mapping(4), 128, 256, jnp.bfloat16, logit_std=3.0)
    x = p.x.at[3, 300].set(jnp.nan).at[40].set(0.0)
    y = p.y.at[40].set(0.0).at[77, 1].set(jnp.inf)
    got = seam(dataclasses.replace(p, x=x, y=y))
    kept = ~np.isin(np.arange(128), [3, 77])
    got = [np.asarray(a, np.float32) for a in got]
    got[2:] = [a.T for a in got[2:]]
    for values in got:
        np.testing.assert_array_equal(np.isfinite(values).all(axis=1), kept)
    p = dataclasses.replace(p, x=x[kept], y=y[kept], h=p.h[:, kept])
    between, u, h, saved = (a[kept] for a in got)
    assert not saved[39, :-1].any()  # the token of zeros, whose inverse rms is 1e10: without its row here
    finite = np.arange(len(saved)) != 39
    wanted = oracle(p, jnp.asarray(between))
    assert_close((between, u, h.T, saved[finite].T), (*wanted[:3], wanted[3][:, finite]), "bfloat16")
    np.testing.assert_allclose(h[:, 8:].astype(np.float64).reshape(-1, 4, 4).sum(axis=2), 1.0, rtol=0, atol=3e-7)


def test_memories_and_races():
    """With a TPU's memories, DMAs and semaphores imitated, uninitialised memory NaN, and races looked for; the last tile is ragged."""
    p = problem(Mapping(2, sinkhorn_steps=2), 600, 128, jnp.bfloat16)
    got = seam(p, pltpu.InterpretParams(detect_races=True))
    assert_close(got, oracle(p, got[0]), "bfloat16")


@pytest.mark.parametrize(("n", "tokens", "steps", "eps", "std"), [(4, 1030, 20, 0.0, 3.0), (2, 7, 1, 0.0, 6.0), (3, 100, 5, 1e-6, 1.0)])
def test_sinkhorn_alone(n, tokens, steps, eps, std):
    rng = np.random.default_rng(1)
    logits, d = (jnp.asarray(rng.normal(size=(n, n, tokens)), jnp.float32) for _ in range(2))
    logits *= std
    got = run(lambda a: sinkhorn(a, steps, eps, interpret=True), logits)
    d_got = run(lambda a, d: sinkhorn_backward(a, d, steps, eps, interpret=True), logits, d)
    with jax.enable_x64(True):
        wanted, pull = jax.vjp(lambda a: reference.sinkhorn(a, steps, eps), wide(logits))
        (d_wanted,) = pull(wide(d))
    assert error(got, np.asarray(wanted)) < 5e-5
    assert error(d_got, np.asarray(d_wanted)) < 3e-4


def test_what_does_not_fit_into_vmem_says_so():
    mapping = Mapping(8)
    arrays = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((128, 8 * 8192), (128, 8192), (80, 128), (80, 8 * 8192), (3,), (80,))]
    with pytest.raises(ValueError, match="MiB of VMEM"):
        jax.eval_shape(lambda x, y, h, *w: forward.post_pre(x, y, h, Weights(*w), mapping), *arrays)
