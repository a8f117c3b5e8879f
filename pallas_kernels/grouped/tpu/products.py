"""Rows times the matrices of their groups: one visit a grid step, its whole contraction at once.

A matrix block stays in VMEM while visits of its group follow each other, and a tile of results while visits of the tile do.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped.tpu.visits import row_tile, visits
from pallas_kernels.tpu import tiles
from pallas_kernels.tpu.tiles import LANES, Interpret

Array = jax.Array
SHARE = 2  # of VMEM that blocks take: the other half holds products and what the compiler needs


def grouped_matmul(x: Array, w: Array, sizes: Array, *, transposed: bool = False, interpret: Interpret = False) -> Array:
    """[R, I] with [E, I, O], or transposed [R, O] with the same matrices, to [R, O] or [R, I]; all multiples of 128."""
    rows, width = x.shape
    out = w.shape[1] if transposed else w.shape[2]
    tile = row_tile(rows)
    block = column_block(out, tile, width, x.dtype.itemsize)
    walk = visits(sizes, rows, tile, all_groups=False)
    if transposed:
        of_w = pl.BlockSpec((1, block, width), lambda column, visit, group, *_: (group[visit], column, 0))
    else:
        of_w = pl.BlockSpec((1, width, block), lambda column, visit, group, *_: (group[visit], 0, column))
    return pl.pallas_call(
        functools.partial(_kernel, transposed),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(out // block, walk.tile.shape[0]),
            in_specs=[pl.BlockSpec((tile, width), lambda column, visit, group, at, *_: (at[visit], 0)), of_w],
            out_specs=pl.BlockSpec((tile, block), lambda column, visit, group, at, *_: (at[visit], column)),
        ),
        out_shape=jax.ShapeDtypeStruct((rows, out), x.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=tiles.vmem_limit(tiles.chip())
        ),
        interpret=interpret,
        name="grouped_matmul",
    )(*walk, x, w)


def column_block(out: int, tile: int, width: int, itemsize: int) -> int:
    """Columns of a block of results: a multiple of 128 that divides `out` and whose blocks fit; two or more blocks for two cores."""
    chip = tiles.chip()
    room = tiles.vmem_limit(chip) // SHARE - 2 * tile * width * itemsize
    a_column = 2 * (width + tile) * itemsize + 4 * tile
    lanes = out // LANES
    most = max(1, room // (a_column * LANES))
    if chip.cores > 1 and lanes > 1:
        most = min(most, lanes // chip.cores)
    return LANES * tiles.divisor(lanes, most)


def _kernel(transposed: bool, group: Any, at: Any, start: Any, stop: Any, x: Any, w: Any, out: Any) -> None:
    visit = pl.program_id(1)
    first = (visit == 0) | (at[visit] != at[jnp.maximum(visit - 1, 0)])
    row = at[visit] * x.shape[0] + jax.lax.broadcasted_iota(jnp.int32, (x.shape[0], 1), 0)
    own = (row >= start[visit]) & (row < stop[visit])

    @pl.when(first)
    def _begin() -> None:
        out[...] = jnp.zeros(out.shape, out.dtype)

    @pl.when(start[visit] < stop[visit])
    def _multiply() -> None:
        contracted = ((1,), (1 if transposed else 0,))
        product = jax.lax.dot_general(x[...], w[0], (contracted, ((), ())), preferred_element_type=jnp.float32)
        out[...] = jnp.where(own, product.astype(out.dtype), out[...])
