"""Which tiles a program visits, and in what order: those under the causal mask that share a document with its own tile. No kernels.

A program owns TILE queries and visits keys, or owns TILE keys and visits queries, `passing` at a time. Tiles in which every pair is visible
come last, so that two loops will do: one with masks, one without.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array

TILE = 128


@dataclass(frozen=True)
class Walk:
    """The steps of a program: first along the diagonal, then what is cut by a document's border, then what is seen in full.

    table: int32 [B * tiles, 4] of `keys_of_queries` or `queries_of_keys`; row: the program's; own: its tile's number in the sequence.
    """

    table: Any
    row: Any
    own: Any
    passing: int

    @property
    def diagonal(self) -> int:
        return TILE // self.passing

    @property
    def masked(self) -> Any:
        """How many steps need a mask."""
        return self.diagonal + self.table[self.row, 1]

    @property
    def steps(self) -> Any:
        return self.masked + self.table[self.row, 3]

    def start(self, step: Any) -> Any:
        """The first position of the tile that is visited at a step."""
        cut, full = self.table[self.row, 0] - self.diagonal, self.table[self.row, 2] - self.masked
        tile = step + jnp.where(step < self.diagonal, self.own * self.diagonal, jnp.where(step < self.masked, cut, full))
        return tile * self.passing


def keys_of_queries(first: Array, passing: int) -> Array:
    """The table for programs that own queries; first [B, S] as in `api`, S a multiple of TILE."""
    lowest, highest = first[:, ::TILE], first[:, TILE - 1 :: TILE]
    diagonal = jnp.arange(lowest.shape[1], dtype=jnp.int32)[None] * (TILE // passing)
    cut = lowest // passing
    full = jnp.minimum(-(-highest // passing), diagonal)
    return _table(cut, full - cut, full, diagonal - full)


def queries_of_keys(end: Array, passing: int) -> Array:
    """The table for programs that own keys; end [B, S] of `ends`."""
    lowest, highest = end[:, ::TILE], end[:, TILE - 1 :: TILE]
    full = jnp.arange(1, lowest.shape[1] + 1, dtype=jnp.int32)[None] * (TILE // passing)
    cut = jnp.maximum(lowest // passing, full)
    return _table(cut, -(-highest // passing) - cut, full, cut - full)


def ends(first: Array) -> Array:
    """int32 [B, S]: key j is seen by the queries j <= i < end[j]."""
    key = jnp.arange(first.shape[1], dtype=first.dtype)
    return jax.vmap(lambda row: jnp.searchsorted(row, key, side="right"))(first).astype(jnp.int32)


def filled(x: Array, axis: int) -> Array:
    """x with zeros up to a multiple of TILE."""
    missing = -x.shape[axis] % TILE
    return jnp.pad(x, [(0, missing if i == axis % x.ndim else 0) for i in range(x.ndim)]) if missing else x


def filled_first(first: Array) -> Array:
    """`first` up to a multiple of TILE: added queries see themselves alone, and nobody sees them."""
    length = first.shape[1]
    position = jnp.arange(length + -length % TILE, dtype=first.dtype)[None]
    return jnp.where(position < length, filled(first, 1), position)


def _table(*columns: Array) -> Array:
    return jnp.stack([jnp.broadcast_to(x, columns[0].shape) for x in columns], axis=-1).reshape(-1, 4)
