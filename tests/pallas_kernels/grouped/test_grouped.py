"""Grouped products and their gradients against float64, group by group; the walk over tiles; and the kernels compiled for a TPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped import grouped_matmul, tpu
from pallas_kernels.grouped.tpu.visits import row_tile, visits
from pallas_kernels.static_cost import compile_for

ROWS, WIDTH, OUT = 384, 128, 256
SIZES = {
    "edges inside tiles": [100, 0, 156, 1, 127],
    "edges on tiles": [128, 256, 0, 0, 0],
    "rows behind the last group": [0, 3, 140, 60, 0],
    "nothing at all": [0, 0, 0, 0, 0],
    "one group": [0, 0, 0, 384, 0],
}


def problem(sizes, dtype):
    rng = np.random.default_rng(0)
    x, w, g = (rng.normal(size=shape) for shape in ((ROWS, WIDTH), (len(sizes), WIDTH, OUT), (ROWS, OUT)))
    return tuple(np.asarray(jnp.asarray(a, dtype), np.float64) for a in (x, w, g))


def oracle(x, w, g, sizes):
    """Product, gradient of rows, gradient of matrices."""
    out, dx, dw = np.zeros((ROWS, OUT)), np.zeros_like(x), np.zeros_like(w)
    for e, stop in enumerate(np.cumsum(sizes)):
        own = slice(stop - sizes[e], stop)
        out[own], dx[own], dw[e] = x[own] @ w[e], g[own] @ w[e].T, x[own].T @ g[own]
    return out, dx, dw


def found(x, w, g, sizes, dtype, implementation):
    x, w, g = (jnp.asarray(a, dtype) for a in (x, w, g))
    multiply = lambda x, w: grouped_matmul(x, w, jnp.array(sizes, jnp.int32), implementation=implementation, interpret=True)  # noqa: E731

    @jax.jit
    def run(x, w, g):
        out, pull = jax.vjp(multiply, x, w)
        return out, *pull(g)

    return run(x, w, g)


@pytest.mark.parametrize("name", SIZES)
def test_kernels_agree_with_float64(name):
    x, w, g = problem(SIZES[name], jnp.float32)
    for ours, exact in zip(found(x, w, g, SIZES[name], jnp.float32, "tpu"), oracle(x, w, g, SIZES[name]), strict=True):
        assert np.abs(np.asarray(ours, np.float64) - exact).max() <= 2e-6 * max(np.abs(exact).max(), 1)


@pytest.mark.parametrize("implementation", ["xla", "tpu"])
def test_bfloat16_is_rounded_once(implementation):
    sizes = SIZES["edges inside tiles"]
    x, w, g = problem(sizes, jnp.bfloat16)
    for ours, exact in zip(found(x, w, g, sizes, jnp.bfloat16, implementation), oracle(x, w, g, sizes), strict=True):
        error = np.abs(np.asarray(ours, np.float64) - exact)
        assert (error <= 2.0**-8 * np.abs(exact) + 1e-4).all(), error.max()


def test_rows_that_fill_no_tile_are_as_good_as_others():
    sizes = [100, 20, 0, 60, 5]
    x, w, g = (a[:200] if i != 1 else a for i, a in enumerate(problem(sizes, jnp.float32)))
    whole = found(x, w, g, sizes, jnp.float32, "xla")
    for ours, plain in zip(found(x, w, g, sizes, jnp.float32, "tpu"), whole, strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-4)


@pytest.mark.parametrize("all_groups", [False, True])
def test_every_row_of_a_group_is_visited_once(all_groups):
    rng = np.random.default_rng(1)
    for _ in range(20):
        sizes = rng.multinomial(rng.integers(0, 1025), rng.dirichlet(np.full(6, 0.3)))
        walk = jax.tree.map(np.asarray, visits(jnp.asarray(sizes, jnp.int32), 1024, 128, all_groups=all_groups))
        seen = np.full(1024, -1)
        for group, tile, start, stop in zip(*walk, strict=True):
            own = np.arange(max(start, tile * 128), min(stop, tile * 128 + 128))
            assert (seen[own] == -1).all()
            seen[own] = group
        assert np.array_equal(seen, np.concatenate([np.repeat(np.arange(6), sizes), np.full(1024 - sizes.sum(), -1)]))
        # A block of results is written when its index changes, so equal ones must follow each other, and all must occur.
        results = walk.group if all_groups else walk.tile
        assert (np.diff(results) >= 0).all() and len(np.unique(results)) == (6 if all_groups else 8)


def test_tile_divides_the_rows():
    assert [row_tile(rows) for rows in (128, 384, 512, 1024, 1536)] == [128, 128, 512, 512, 512]


@pytest.mark.parametrize("shape", [(128, 96, 128), (128, 128, 64)])
def test_kernels_refuse_what_they_cannot_take(shape):
    rows, width, out = shape
    with pytest.raises(ValueError, match="multiples of 128"):
        grouped_matmul(jnp.ones((rows, width)), jnp.ones((2, width, out)), jnp.ones(2, jnp.int32), implementation="tpu", interpret=True)


def test_bad_shapes_and_types_are_named():
    x, w, sizes = jnp.ones((8, 4)), jnp.ones((2, 4, 4)), jnp.ones(2, jnp.int32)
    with pytest.raises(ValueError, match="shapes"):
        grouped_matmul(x, w[:, :3], sizes)
    with pytest.raises(ValueError, match="types"):
        grouped_matmul(x, w, sizes.astype(jnp.int16))


def gradients(x, w, sizes, g):
    return tpu.grouped_matmul(g, w, sizes, transposed=True), tpu.grouped_outer(x, g, sizes)


@pytest.mark.parametrize(
    "chip", [pytest.param(chip, marks=pytest.mark.slow) for chip in ("v6e:2x2", "v5e:2x2", "v5p:2x2x1", "tpu7x:2x2x1")]
)
def test_compiles(chip):
    """The first product of the experts of the mHC paper's 27B model (arXiv 2512.24880, Table 5), for 8192 tokens, and its gradients."""
    rows, groups, width, out = 8192 * 6, 72, 2560, 2 * 1536
    x, w, g = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((rows, width), (groups, width, out), (rows, out)))
    sizes = jax.ShapeDtypeStruct((groups,), jnp.int32)
    assert "grouped_matmul" in compile_for(chip, tpu.grouped_matmul, (x, w, sizes)).as_text()
    assert "grouped_outer" in compile_for(chip, gradients, (x, w, sizes, g)).as_text()
