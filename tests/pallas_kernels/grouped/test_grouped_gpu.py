"""GPU kernels of grouped products, run on a Hopper GPU or interpreted on the CPU, and lowered for Hopper. Nothing here is timed."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper import INTERPRET, on_hopper

from pallas_kernels.grouped import grouped_matmul
from pallas_kernels.grouped.cases import cases
from pallas_kernels.grouped.gpu.walk import TILE, walk
from pallas_kernels.static_cost import compile_for, lower_for

BF16 = jnp.bfloat16
SIZES = {
    "edges inside tiles": [100, 0, 60, 1, 95],
    "edges on tiles": [128, 0, 0, 128],
    "rows behind the last group": [0, 3, 140, 0],
    "nothing at all": [0, 0],
}


def check(sizes, rows: int, width: int, out: int) -> None:
    """Product, gradient of rows and gradient of matrices against float64, group by group; rounded once."""
    rng = np.random.default_rng(0)
    shapes = (rows, width), (len(sizes), width, out), (rows, out)
    x, w, g = (jnp.asarray(rng.normal(size=shape), BF16) for shape in shapes)

    @jax.jit
    def run(x, w, g):
        product = lambda x, w: grouped_matmul(x, w, jnp.array(sizes, jnp.int32), implementation="gpu", interpret=INTERPRET)  # noqa: E731
        made, pull = jax.vjp(product, x, w)
        return made, *pull(g)

    wide = [np.asarray(a, np.float64) for a in (x, w, g)]
    for index, found in enumerate(map(np.asarray, run(x, w, g))):
        for e, stop in enumerate(np.cumsum(sizes)):
            x_e, g_e = (a[stop - sizes[e] : stop] for a in (wide[0], wide[2]))
            exact = (lambda: x_e @ wide[1][e], lambda: g_e @ wide[1][e].T, lambda: x_e.T @ g_e)[index]()  # noqa: B023
            ours = found[e] if index == 2 else found[stop - sizes[e] : stop]
            # Sums of `depth` products in float32, in any order, and one rounding.
            depth = (width, out, sizes[e])[index]
            bound = 2.0**-8 * np.abs(exact) + 2.0**-24 * depth * 8
            assert (np.abs(ours.astype(np.float64) - exact) <= bound).all(), (index, e)
        assert index == 2 or not found[sum(sizes) :].any()


@pytest.mark.parametrize("name", ["edges inside tiles", *(pytest.param(name, marks=pytest.mark.slow) for name in list(SIZES)[1:])])
def test_products_and_gradients_equal_float64(name):
    check(SIZES[name], 256, 128, 128)


@pytest.mark.slow
def test_blocks_of_256_columns_equal_float64():
    check([60, 68], 128, 256, 128)


@on_hopper
@pytest.mark.parametrize(("groups", "rows", "width", "out"), [(64, 16384, 1280, 1792), (72, 8192, 1536, 2560), (8, 4096, 7168, 4096)])
def test_published_sizes_equal_float64(groups, rows, width, out):
    rng = np.random.default_rng(1)
    check(rng.multinomial(rows - 100, rng.dirichlet(np.full(groups, 0.5))), rows, width, out)


def test_every_row_of_a_group_is_visited_once():
    rng = np.random.default_rng(1)
    for _ in range(20):
        sizes = rng.multinomial(rng.integers(0, 1025), rng.dirichlet(np.full(6, 0.3)))
        found = jax.tree.map(np.asarray, walk(jnp.asarray(sizes, jnp.int32), 1024))
        group_of_row = np.full(1024, -1)
        for tile, (first, count) in enumerate(zip(found.first, found.visited)):
            rows = np.arange(tile * TILE, (tile + 1) * TILE)
            start = found.stop[first - 1] if first > 0 else 0
            for number in range(first, first + count):
                own = rows[(rows >= start) & (rows < found.stop[number])]
                assert len(own) and (group_of_row[own] == -1).all()
                group_of_row[own], start = found.group[number], found.stop[number]
        assert np.array_equal(group_of_row, np.concatenate([np.repeat(np.arange(6), sizes), np.full(1024 - sizes.sum(), -1)]))


@pytest.mark.parametrize("case", cases(), ids=lambda case: f"{case.direction} {case.kernel} {case.name}")
def test_real_shapes_lower_to_a_kernel_and_their_groups_hold_all_rows(case):
    fn, args = case.build("gpu")
    lowered = lower_for("H100", fn, args)
    assert lowered.as_text().count("@mosaic_gpu") == 1
    assert int(case.values(args)[-1].sum()) == args[0].shape[0]
    plain, _ = case.build("xla")
    assert lowered.out_info.shape == jax.eval_shape(plain, *args).shape


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs JAX's CUDA plugin")
@pytest.mark.parametrize("case", cases()[:3], ids=lambda case: f"{case.direction} {case.kernel}")
def test_a_real_shape_compiles_and_needs_no_memory_but_its_result(case):
    """XLA's product would write every row once for each group."""
    for chip in ("H100", "H200"):
        assert compile_for(chip, *case.build("gpu")).memory_analysis().temp_size_in_bytes < 1 << 20


@pytest.mark.parametrize(
    ("width", "dtype", "message"), [(128, jnp.float32, "the GPU kernels take bfloat16"), (96, BF16, "I and O are 96 and 128")]
)
def test_what_the_kernels_cannot_take_goes_to_xla_and_is_refused_by_name(width, dtype, message):
    x, w, sizes = jnp.ones((1024, width), dtype), jnp.ones((2, width, 128), dtype), jnp.ones(2, jnp.int32)
    with pytest.raises(ValueError, match=message):
        grouped_matmul(x, w, sizes, implementation="gpu", interpret=True)
    assert "@mosaic_gpu" not in lower_for("H100", grouped_matmul, (x, w, sizes)).as_text()


@pytest.mark.parametrize(("rows", "kernels"), [(96, 0), (1000, 1)])
def test_any_number_of_rows_but_few_takes_the_kernel(rows, kernels):
    x, w, sizes = jnp.ones((rows, 128), BF16), jnp.ones((2, 128, 128), BF16), jnp.ones(2, jnp.int32)
    lowered = lower_for("H100", grouped_matmul, (x, w, sizes))
    assert lowered.as_text().count("@mosaic_gpu") == kernels and lowered.out_info.shape == (rows, 128)
