"""The gradients of single tokens' latents on TPU, added up in a fixed order: range of keys by range, in each query by query.

The sum over a range of keys stays in VMEM, a key's row as lines of 128 numbers below one another: adding a row is one load, one addition
and one store at a place of its own. A range's rows come tile by tile: the keys of a query rise, so those within a range lie in few tiles,
and what of a tile belongs to another range is added to a row that no one reads. What the tiles of a chunk are, XLA lists (`_items`).

A tile's gradients are one product of what `tokens_backward` wrote, over all heads: d_logits^T q + weight^T d_o. They are added while the
product of the next tile runs: a grid step has two tiles, with a buffer each.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.sparse_attention.tpu.blocks import product
from pallas_kernels.sparse_attention.tpu.rows import TILE
from pallas_kernels.tpu import tiles
from pallas_kernels.tpu.tiles import LANES, MIB, Interpret

Array = jax.Array
PIECES = 8  # DMAs that a range is moved by
TOGETHER = 8  # rows that are read before the first of them is written: the keys of a tile differ
BESIDE = 6 * MIB  # of VMEM, for everything but the sum


def sum_of(latent: Array, *, interpret: Interpret = False) -> Array:
    """Zeros to add gradients of latents [B, T, W] to: float32 [cores, ranges, lines, 128], every core adding up its own queries."""
    del interpret  # no kernel
    keys, lines = latent.shape[0] * latent.shape[1], _lines(latent.shape[2])
    most = (tiles.vmem_limit(tiles.chip()) - BESIDE) // (lines * LANES * 4)
    ranges = -(-keys // most)
    return jnp.zeros((tiles.chip().cores, ranges, tiles.round_up(-(-keys // ranges), 8 * PIECES) * lines, LANES), jnp.float32)


def gradient_of(total: Array, latent: Array, *, interpret: Interpret = False) -> Array:
    """What `total` of `sum_of` has come to, [B, T, W] float32."""
    del interpret  # no kernel
    batch, keys, width = latent.shape
    rows = total.sum(axis=0).reshape(-1, _lines(width) * LANES)
    return rows[: batch * keys, :width].reshape(batch, keys, width)


def _lines(width: int) -> int:
    return -(-width // LANES)


def scatter(
    total: Array, index: Array, count: Array, factors: Array, q: Array, d_o: Array, keys: int, *, interpret: Interpret = False
) -> Array:
    """`total` with the gradients added of rows index [Q, k] of all sequences' latents, of which the first count [Q] are keys and rise.

    factors [Q, 2 H, k]: gradients of logits, and probabilities; q [Q, H, lines 128] and d_o [Q, H, K]; all bfloat16. Q is a multiple of the
    cores, and all rows of a query belong to one sequence of `keys` latents.
    """
    cores, ranges, length, _ = total.shape
    queries, heads, width = q.shape
    lines, rank = width // LANES, d_o.shape[-1]
    size = length // lines
    place, item = _items(index, count, cores, ranges, size, lines, min(ranges, -(-keys // size) + 1))
    steps = item.shape[1]

    def at_step(half: int) -> pl.BlockSpec:
        """The places of the tile before a step's first, and of that one."""
        return pl.BlockSpec((1, 1, TILE), lambda c, i: (c * 2 * steps + jnp.maximum(2 * i + half - 1, 0), 0, 0), memory_space=pltpu.SMEM)

    return pl.pallas_call(
        functools.partial(_kernel, heads, rank, lines, queries // cores, not interpret),
        grid=(cores, steps),
        in_specs=[
            pl.BlockSpec((1, 1, LANES), lambda c, i: (c * steps + i, 0, 0), memory_space=pltpu.SMEM),
            at_step(0),
            at_step(1),
            *[pl.BlockSpec(memory_space=pl.ANY)] * 4,
        ],
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        scratch_shapes=[
            pltpu.VMEM((length + 8, LANES), jnp.float32),
            *[pltpu.VMEM((2 * heads, TILE), q.dtype)] * 2,
            *[pltpu.VMEM((2 * heads, width), q.dtype)] * 2,
            *[pltpu.VMEM((TILE * lines, LANES), jnp.float32)] * 2,
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SemaphoreType.DMA,
        ],
        out_shape=jax.ShapeDtypeStruct(total.shape, total.dtype),
        input_output_aliases={6: 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=tiles.vmem_limit(tiles.chip()),
            disable_bounds_checks=True,  # of places that are computed here
        ),
        interpret=interpret,
        name="sparse_scatter",
    )(item.reshape(-1, 1, LANES), place, place, factors, q, d_o, total)


def _items(index: Array, count: Array, cores: int, ranges: int, size: int, lines: int, most: int) -> tuple[Array, Array]:
    """The tiles that a chunk's gradients are added by: of each core, range by range, in each query by query, in each as they lie.

    `most`: the ranges that the keys of one query may lie in.

    Returns:
      places int32 [cores tiles, 1, TILE]: the line of the sum where each row of a tile goes.
      item int32 [cores, steps, 128], of two tiles each, the fields that `_kernel` reads. The last tile stands for nothing and is not added.
    """
    queries, chosen = index.shape
    of_query, each = chosen // TILE, queries // cores
    items = tiles.round_up(each * (of_query + most - 1) + 1, 2)
    valid = jnp.arange(chosen, dtype=jnp.int32)[None] < count[:, None]
    edges = jnp.arange(ranges + 1, dtype=jnp.int32) * size
    before = jnp.stack([jnp.sum(valid & (index < edge), axis=1, dtype=jnp.int32) for edge in edges]).reshape(ranges + 1, cores, each)
    first, after = before[:-1] // TILE, -(-before[1:] // TILE)
    number = jnp.where(before[1:] > before[:-1], after - first, 0).swapaxes(0, 1).reshape(cores, -1)
    end = jax.lax.associative_scan(jnp.add, number, axis=1)  # XLA's cumsum is quadratic here
    query = jnp.arange(each, dtype=jnp.int32)[None, None] + each * jnp.arange(cores, dtype=jnp.int32)[:, None, None]
    offset = (query * of_query + first.swapaxes(0, 1)).reshape(cores, -1) - (end - number)  # which tile an item is, but for its number
    which = jnp.arange(items, dtype=jnp.int32)[None]
    some = which < end[:, -1:]
    # Which range and query an item belongs to. Of one core at a time, as XLA pads a leading axis of 1.
    pair = jnp.stack([jnp.sum(of_core[None] <= which.T, axis=1, dtype=jnp.int32) for of_core in end])
    pair = jnp.minimum(pair, end.shape[1] - 1)
    tile = jnp.where(some, jnp.take_along_axis(offset, pair, axis=1) + which, 0)
    last = jnp.max(jnp.where(number > 0, jnp.arange(ranges * each, dtype=jnp.int32)[None], 0), axis=1, keepdims=True) // each
    of_range = jnp.where(some, pair // each, last)
    row = jnp.where(valid, index, -1).reshape(-1, TILE)[tile] - of_range[..., None] * size
    place = jnp.where(some[..., None] & (row >= 0) & (row < size), row * lines, size * lines)
    query, part = tile // of_query, tile % of_query * TILE

    def earlier(x: Array, by: int) -> Array:
        return jnp.concatenate([x[:, :1]] * by + [x[:, : items - by]], axis=1)

    def later(x: Array) -> Array:
        return jnp.concatenate([x[:, 1:], x[:, -1:]], axis=1)

    fields = [earlier(of_range, 2), earlier(of_range, 1), of_range, query, part, later(query), later(part)]
    even, odd = (jnp.stack([x[:, half::2] for x in fields[3:]], axis=2) for half in range(2))
    ranges_of = jnp.stack([x[:, ::2] for x in fields[:3]], axis=2)
    item = jnp.concatenate([ranges_of, even, odd[..., 2:]], axis=2)  # 3 ranges; query and part of the first, the second, the next first
    return place.reshape(-1, 1, TILE), jnp.pad(item, ((0, 0), (0, 0), (0, LANES - item.shape[2])))


def _kernel(
    heads: int,
    rank: int,
    lines: int,
    each: int,
    unroll: bool,
    item: Any,
    before: Any,
    first: Any,
    factors: Any,
    q: Any,
    d_o: Any,
    given: Any,
    total: Any,
    sums: Any,
    even_factors: Any,
    odd_factors: Any,
    even_queries: Any,
    odd_queries: Any,
    even_rows: Any,
    odd_rows: Any,
    arrived: Any,
    moved: Any,
) -> None:
    del given  # the same memory as `total`
    core, step, steps = pl.program_id(0), pl.program_id(1), pl.num_programs(1)
    length = total.shape[2]
    sides = ((even_factors, even_queries), (odd_factors, odd_queries))
    rows = (even_rows, odd_rows)

    def fetch(field: int, slot: int) -> None:
        query, part = item[0, 0, field], pl.multiple_of(item[0, 0, field + 1], TILE)
        left, right = sides[slot]
        for there, here in (
            (factors.at[query, :, pl.ds(part, TILE)], left),
            (q.at[query], right.at[pl.ds(0, heads)]),
            (d_o.at[query], right.at[pl.ds(heads, heads), pl.ds(0, rank)]),
        ):
            pltpu.make_async_copy(there, here, arrived.at[slot]).start()

    def wait(slot: int) -> None:
        left, right = sides[slot]
        for here in (left, right.at[pl.ds(0, heads)], right.at[pl.ds(heads, heads), pl.ds(0, rank)]):
            pltpu.make_async_copy(here, here, arrived.at[slot]).wait()

    def move(number: Any, there: bool) -> None:
        """The sum of a range to where it is kept, or from there."""

        def piece(i: Any, _: Any) -> Any:
            lines = pl.ds(pl.multiple_of(i * (length // PIECES), 8), length // PIECES)
            ends = (sums.at[lines], total.at[core, number, lines])
            pltpu.make_async_copy(*(ends if there else ends[::-1]), moved).start()
            return _

        jax.lax.fori_loop(0, PIECES, piece, 0)
        whole = sums.at[pl.ds(0, length)]
        pltpu.make_async_copy(whole, whole, moved).wait()

    def add(rows: Any, place: Any) -> None:
        def some(group: Any, _: Any) -> Any:
            begin = group * TOGETHER
            at = [pl.ds(place[0, 0, begin + i], lines) for i in range(TOGETHER)]
            added = [sums[at[i], :] + rows[pl.ds((begin + i) * lines, lines), :] for i in range(TOGETHER)]
            for i in range(TOGETHER):
                sums[at[i], :] = added[i]
            return _

        jax.lax.fori_loop(0, TILE // TOGETHER, some, 0, unroll=unroll)

    @pl.when(step == 0)
    def _() -> None:
        fetch(3, 0)
        for _, right in sides:
            right[pl.ds(heads, heads), pl.ds(rank, right.shape[1] - rank)] = jnp.zeros((heads, right.shape[1] - rank), right.dtype)
        sums[pl.ds(length, 8), :] = jnp.zeros((8, LANES), sums.dtype)
        odd_rows[...] = jnp.zeros_like(odd_rows)  # no tile came before
        move(item[0, 0, 0], False)

    for half in range(2):
        fetch(5 + 2 * half, 1 - half)
        wait(half)

        @pl.when(item[0, 0, half] != item[0, 0, half + 1])
        def _(half: int = half) -> None:
            move(item[0, 0, half], True)
            move(item[0, 0, half + 1], False)

        left, right = sides[half]
        found = product(left[...], right[...], (0, 0))
        for line in range(lines):
            rows[half][pl.ds(line, TILE, stride=lines), :] = found[:, line * LANES : (line + 1) * LANES]
        add(rows[1 - half], (before, first)[half])

    @pl.when(step == steps - 1)
    def _() -> None:
        wait(0)
        move(item[0, 0, 2], True)
