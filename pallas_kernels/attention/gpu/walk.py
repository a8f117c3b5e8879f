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
    """The steps of a program: first along the diagonal, then what is cut by a document's border, then what is seen in full."""

    own: Any  # the number of the program's tile in the sequence
    passing: int
    cut: Any  # the number of the first tile that a border cuts
    full: Any  # and of the first that is seen in full
    masked: Any  # how many steps need a mask
    steps: Any

    @classmethod
    def read(cls, table: Any, row: Any, own: Any, passing: int) -> "Walk":
        """From a row of an int32 table [B * tiles, 4] of `keys_of_queries` or `queries_of_keys`; read once, not in every step."""
        cut, cuts, full, fulls = (table[row, i] for i in range(4))
        masked = TILE // passing + cuts
        return cls(own, passing, cut, full, masked, masked + fulls)

    @property
    def diagonal(self) -> int:
        return TILE // self.passing

    def start(self, step: Any) -> Any:
        """The first position of the tile that is visited at a step."""
        others = jnp.where(step < self.masked, self.cut - self.diagonal, self.full - self.masked)
        return (step + jnp.where(step < self.diagonal, self.own * self.diagonal, others)) * self.passing


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
