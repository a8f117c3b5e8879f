"""Of every group the sum over its rows of one row times another: the gradient of the groups' matrices."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped.tpu.visits import row_tile, visits
from pallas_kernels.tpu import tiles
from pallas_kernels.tpu.tiles import LANES, Interpret

Array = jax.Array
SHARE = 2  # of VMEM that blocks take


def grouped_outer(x: Array, g: Array, sizes: Array, *, interpret: Interpret = False) -> Array:
    """x [R, I] and g [R, O] to [E, I, O] of x's type, summed in float32; all multiples of 128. A group without rows gets zeros."""
    rows, width = x.shape
    out = g.shape[1]
    tile = row_tile(rows)
    of_x, of_g = blocks(width, out, tile, x.dtype.itemsize)
    walk = visits(sizes, rows, tile, all_groups=True)
    return pl.pallas_call(
        _kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(width // of_x, out // of_g, walk.tile.shape[0]),
            in_specs=[
                pl.BlockSpec((tile, of_x), lambda i, o, visit, group, at, *_: (at[visit], i)),
                pl.BlockSpec((tile, of_g), lambda i, o, visit, group, at, *_: (at[visit], o)),
            ],
            out_specs=pl.BlockSpec((1, of_x, of_g), lambda i, o, visit, group, *_: (group[visit], i, o)),
            scratch_shapes=[pltpu.VMEM((of_x, of_g), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((sizes.shape[0], width, out), x.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=tiles.vmem_limit(tiles.chip())
        ),
        interpret=interpret,
        name="grouped_outer",
    )(*walk, x, g)


def blocks(width: int, out: int, tile: int, itemsize: int) -> tuple[int, int]:
    """Rows and columns of a block of results, multiples of 128 that divide theirs: the pair that fits and moves the fewest bytes."""
    chip = tiles.chip()
    room = tiles.vmem_limit(chip) // SHARE

    def sizes(total: int) -> list[int]:
        lanes = total // LANES
        return [LANES * n for n in range(1, lanes + 1) if lanes % n == 0]

    def fits(i: int, o: int) -> bool:
        needed = 2 * tile * (i + o) * itemsize + i * o * (8 + 2 * itemsize)
        return needed <= room and (chip.cores == 1 or (width // i) * (out // o) >= chip.cores or width * out == LANES**2)

    pairs = [(i, o) for i in sizes(width) for o in sizes(out) if fits(i, o)]
    return min(pairs, key=lambda pair: (width * (out // pair[1]) + out * (width // pair[0]), -min(pair)))


def _kernel(group: Any, at: Any, start: Any, stop: Any, x: Any, g: Any, out: Any, total: Any) -> None:
    visit, last = pl.program_id(2), pl.num_programs(2) - 1
    own = group[visit]
    row = at[visit] * x.shape[0] + jax.lax.broadcasted_iota(jnp.int32, (x.shape[0], 1), 0)
    mine = (row >= start[visit]) & (row < stop[visit])

    @pl.when((visit == 0) | (own != group[jnp.maximum(visit - 1, 0)]))
    def _begin() -> None:
        total[...] = jnp.zeros(total.shape, total.dtype)

    @pl.when(start[visit] < stop[visit])
    def _add() -> None:
        rows = jnp.where(mine, x[...], jnp.zeros((), x.dtype))
        total[...] += jax.lax.dot_general(rows, g[...], (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    @pl.when((visit == last) | (own != group[jnp.minimum(visit + 1, last)]))
    def _end() -> None:
        out[0] = total[...].astype(out.dtype)
