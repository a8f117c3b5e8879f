"""Which groups have rows in which tile of sorted rows. No kernels."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array

TILE = 128  # rows


class Walk(NamedTuple):
    """int32; groups with rows come first, in their order, and only they are visited."""

    group: Array  # [E] the number of each
    stop: Array  # [E] its last row is the one before
    first: Array  # [tiles] the first that has rows in a tile
    visited: Array  # [tiles] how many have


def walk(sizes: Array, rows: int) -> Walk:
    """Of sizes [E] int32 of groups that lie back to back among `rows` rows, a multiple of TILE."""
    group = jnp.argsort(sizes == 0, stable=True).astype(jnp.int32)
    sizes = sizes[group]
    stop = jnp.cumsum(sizes, dtype=jnp.int32)
    start = (jnp.arange(rows // TILE, dtype=jnp.int32) * TILE)[:, None]
    before = jnp.sum(stop[None] <= start, axis=1, dtype=jnp.int32)
    begun = jnp.sum(((stop - sizes)[None] < start + TILE) & (sizes > 0)[None], axis=1, dtype=jnp.int32)
    return Walk(group, stop, before, jnp.maximum(begun - before, 0))
