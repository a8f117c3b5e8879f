"""The walk over tiles of sorted rows: a visit is a tile and a group that has rows in it, in the order of both.

A tile that holds rows of two groups is visited twice, once for either, with the other's rows masked. How many visits there are is data; the
grid has as many as there can be, and those left over do nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Visits(NamedTuple):
    """int32 [V] each."""

    group: Array
    tile: Array
    start: Array  # rows of the group: from start
    stop: Array  # up to, not including; equal to start where a visit does nothing


def row_tile(rows: int, most: int = 512) -> int:
    """Rows of a tile: 128 times a power of two that divides `rows`, a multiple of 128."""
    tile = 128
    while tile < most and rows % (2 * tile) == 0:
        tile *= 2
    return tile


def visits(sizes: Array, rows: int, tile: int, *, all_groups: bool) -> Visits:
    """The visits of `rows` rows in tiles of `tile`.

    Args:
      sizes: [E] int32, rows of each group.
      rows: of all groups, and those behind the last one.
      tile: divides `rows`.
      all_groups: whether a group without rows is visited, doing nothing, so that its result is written. Otherwise the rows behind the last
        group are, so that theirs is; that visit's group is the last one.
    """
    groups, tiles = sizes.shape[0], rows // tile
    if not all_groups:
        sizes = jnp.concatenate([sizes, rows - sizes.sum(keepdims=True, dtype=jnp.int32)])
    stop = jnp.cumsum(sizes, dtype=jnp.int32)
    start = stop - sizes
    first = jnp.minimum(start // tile, tiles - 1)
    count = jnp.where(sizes > 0, (stop - 1) // tile - first + 1, 1 if all_groups else 0)
    behind = jnp.cumsum(count, dtype=jnp.int32)
    visit = jnp.arange(tiles + groups, dtype=jnp.int32)
    group = jnp.minimum(jnp.searchsorted(behind, visit, side="right").astype(jnp.int32), sizes.shape[0] - 1)
    real = visit < behind[-1]
    at = jnp.where(real, first[group] + visit - (behind - count)[group], tiles - 1 if not all_groups else first[-1])
    end = jnp.where(real & (group < groups), stop[group], start[group])
    return Visits(jnp.minimum(group, groups - 1), at, start[group], end)
