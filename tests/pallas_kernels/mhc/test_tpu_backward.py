"""The backward kernels for TPU, interpreted, against float64 gradients of the specification."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mhc import reference
from pallas_kernels.mhc.spec import Mapping, Weights
from pallas_kernels.mhc.tpu import backward
from pallas_kernels.mhc.tpu.tiles_backward import tiles

F32, BF16 = jnp.float32, jnp.bfloat16


class Seam:
    """Random arrays for one seam: float64 for the specification, the streams' type and float32 for the kernels."""

    def __init__(self, mapping: Mapping, width: int, tokens: int, dtype, std: float = 1.0, zero: int | None = None):
        draw = np.random.default_rng(mapping.n).standard_normal
        n, rows = mapping.n, mapping.rows
        self.mapping, self.dtype = mapping, dtype
        self.x, self.y, self.d_between, self.d_u = (jnp.asarray(draw((tokens, k * width)), dtype).astype(jnp.float64) for k in (n, 1, n, 1))
        if zero is not None:
            self.x, self.y = self.x.at[zero].set(0), self.y.at[zero].set(0)
        self.h, self.d_h = jnp.asarray(np.float64(np.float32(draw((2, rows, tokens)))))
        weights = draw((rows, n * width)) / np.sqrt(n * width), np.full(len(mapping.groups), std), 0.3 * draw(rows)
        self.weights = Weights(*(jnp.asarray(np.float64(np.float32(w))) for w in weights))
        start = draw((rows, tokens)) * std
        self.h = jnp.concatenate([jax.nn.sigmoid(start[:n]), 2 * jax.nn.sigmoid(start[n : 2 * n])])
        if mapping.mixes:
            res = reference.sinkhorn(jnp.asarray(start[2 * n :]).reshape(n, n, tokens))
            self.h = jnp.concatenate([self.h, res.reshape(n * n, tokens)])
        self.h = jnp.asarray(np.float64(np.float32(self.h)))

    def saved(self, streams):
        inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(streams), axis=-1) + self.mapping.norm_eps)
        return jnp.concatenate([self.weights.phi @ streams.T * inverse_rms[None], inverse_rms[None]]).astype(F32)

    def narrow(self, *arrays):
        return [a.astype(self.dtype) for a in arrays]

    def specified(self, part: str):
        """Gradients by JAX from the specification, in float64."""
        if part == "post":
            return jax.vjp(lambda x, y, h: reference.mhc_post(x, y, h, self.mapping), self.x, self.y, self.h)[1](self.d_between)
        if part == "pre":
            _, pull = jax.vjp(lambda x, w, h: reference.mhc_pre(x, w, self.mapping, h), self.x, self.weights, self.h)
            return pull((self.d_u, self.d_h))
        function = lambda x, y, h, w: reference.mhc_post_pre(x, y, h, w, self.mapping)  # noqa: E731
        _, pull = jax.vjp(function, self.x, self.y, self.h, self.weights)
        return pull((self.d_between, self.d_u, self.d_h))

    def computed(self, part: str):
        """The same by the kernels."""
        x, y, d_between, d_u = self.narrow(self.x, self.y, self.d_between, self.d_u)
        h, d_h, weights = jax.tree.map(lambda a: a.astype(F32), (self.h, self.d_h, self.weights))
        if part == "post":
            return backward.post_backward(x, y, h, self.mapping, d_between, interpret=True)
        if part == "pre":
            previous = h if self.mapping.reads == "previous" else None
            return backward.pre_backward(x, weights, self.mapping, previous, self.saved(self.x), d_u, d_h, interpret=True)
        saved = self.saved(reference.mhc_post(self.x, self.y, self.h, self.mapping))
        return backward.post_pre_backward(x, y, h, weights, self.mapping, saved, d_between, d_u, d_h, interpret=True)

    def check(self, part: str = "post_pre", roundings: float = 1.5):
        """Relative l2 errors are bounded by what rounding the oracle's gradients to the streams' type costs.

        In float32 by that of the interpreted reciprocal, a bfloat16 estimate with one Newton step, 2^-16, through 20 steps.
        """
        wanted, got = jax.tree.leaves(self.specified(part)), jax.tree.leaves(self.computed(part))
        if part == "pre" and self.mapping.reads == "own":
            wanted = wanted[:-1]
        rounded = self.narrow(wanted[0])[0].astype(jnp.float64)
        bound = max(roundings * float(jnp.linalg.norm(rounded - wanted[0]) / jnp.linalg.norm(wanted[0])), 20 * 2.0**-16)
        for want, have in zip(wanted, got, strict=True):
            assert have.shape == want.shape
            assert jnp.linalg.norm(have - want) <= bound * jnp.linalg.norm(want)


@pytest.mark.parametrize(
    "mapping, width, tokens, dtype, std",
    [
        (Mapping(4), 128, 130, BF16, 1.0),
        pytest.param(Mapping(2, reads="previous"), 128, 600, BF16, 6.0, marks=pytest.mark.slow),  # three tiles for two cores
        (Mapping(2, mixes=False, pre_eps=1e-6, norm_eps=1e-6), 128, 70, BF16, 0.5),
        pytest.param(Mapping(2, sinkhorn_eps=1e-6), 384, 1, F32, 3.0, marks=pytest.mark.slow),
        pytest.param(Mapping(1, sinkhorn_steps=1), 512, 256, F32, 3.0, marks=pytest.mark.slow),
        pytest.param(Mapping(8), 128, 70, BF16, 3.0, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_seam(float64, mapping, width, tokens, dtype, std):
    Seam(mapping, width, tokens, dtype, std).check()


@pytest.mark.parametrize("mapping", [pytest.param(Mapping(2), marks=pytest.mark.slow), Mapping(2, mixes=False, reads="previous")], ids=str)
@pytest.mark.parametrize("part", ["pre", "post"])
def test_a_part_alone(float64, part, mapping):
    Seam(mapping, 128, 150, F32).check(part)


@pytest.mark.parametrize("narrow", [pytest.param(128, marks=pytest.mark.slow), pytest.param(256, marks=pytest.mark.slow)])
def test_streams_mixed_in_bfloat16(float64, monkeypatch, narrow):
    """As on v6e and tpu7x: x' with two more roundings, which reach d_phi and, weakly, dx."""
    monkeypatch.setattr(backward, "tiles", lambda *a: replace(tiles(*a), narrow=narrow, group=16))
    Seam(Mapping(2), 256, 64, BF16).check(roundings=3)


def test_tiles_with_fewer_tokens_than_lanes(float64, monkeypatch):
    """As where wide streams leave VMEM no room for more: three tiles, the last one ragged, for two cores."""
    monkeypatch.setattr(backward, "tiles", lambda *a: replace(tiles(*a), tokens=64, cores=2))
    Seam(Mapping(2), 128, 150, BF16).check()


@pytest.mark.slow
def test_a_token_of_zeros(float64):
    """Its inverse rms is 1e10, and its gradients are still those of the specification."""
    Seam(Mapping(2), 128, 40, F32, zero=7).check()


def test_a_token_that_is_not_finite_spoils_no_other(float64):
    """Neither in its own Gram block nor in its tile."""
    seam, bad = Seam(Mapping(2), 128, 40, F32), 7
    others = np.delete(np.arange(40), bad)
    clean = seam.computed("post_pre")
    seam.x = seam.x.at[bad, 3].set(jnp.nan)
    dx, dy, dh, _ = seam.computed("post_pre")
    assert not jnp.isfinite(dx[bad]).all()
    for have, want in ((dx, clean[0]), (dy, clean[1]), (dh.T, clean[2].T)):
        np.testing.assert_array_equal(have[others], want[others])


def test_sizes_that_do_not_fit_say_what_would(float64):
    with pytest.raises(ValueError, match="a smaller width"):
        Seam(Mapping(8), 128 * 100, 1, F32).computed("post")
    with pytest.raises(ValueError, match="multiple of 128"):
        Seam(Mapping(2), 100, 1, F32).computed("post")
