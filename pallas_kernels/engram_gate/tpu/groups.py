"""What both directions on TPU share: sizes, loads and stores of a group of tokens, and numbers of tokens as rows and as columns.

Two layouts meet. In HBM what is one number a token has tokens on lanes, a row. Beside streams, which have tokens on sublanes, it is a
column that stands in every lane.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.tpu import tiles
from pallas_kernels.tpu.tiles import LANES

Ref = Any
Array = jax.Array


@dataclass(frozen=True)
class Shape:
    """Sizes of one kernel: n streams of `width` lanes, `tokens` to a tile."""

    n: int
    width: int
    tokens: int
    group: int  # tokens that one step of a loop over the streams takes
    unroll: int  # such steps in one block of code

    def lanes(self) -> range:
        """Where the blocks of 128 lanes of a stream begin."""
        return range(0, self.width, LANES)


def shape_of(x: Array, n: int, streams: int, floats: int, fixed: int, interpret: Any, *, steps: int = 1, least: int = LANES) -> Shape:
    """Sizes for the chip that is traced for, where a token has so many streams that move, and so many floats that do not.

    `fixed` bytes do not grow with a tile, `steps` groups of 8 tokens and 2560 lanes are put into one block of code, and a tile has no fewer
    than `least` tokens.
    """
    chip, width = tiles.chip(), x.shape[1] // n
    per_token = 2 * streams * width * x.dtype.itemsize + 4 * floats
    tile = tiles.token_tile(x.shape[0], per_token, fixed + 2 * tiles.MIB, chip, 256, least)
    group = 8 if chip.generation < 6 or x.dtype == jnp.float32 else 16
    unroll = 1 if interpret else tiles.divisor(tile // group, max(1, steps * 8 * 2560 // (group * width)))
    return Shape(n, width, tile, group, unroll)


def by_group(shape: Shape, prepare: Callable[[Any], Any], step: Callable[[Any, Any], None]) -> None:
    """step(tokens, prepare(tokens)) for every group of a tile.

    What is prepared ends in sums over lanes, whose latency is long; so it is prepared while the group before takes its step.
    """
    groups = shape.tokens // shape.group

    def tokens(index):
        return pl.ds(pl.multiple_of(index * shape.group, shape.group), shape.group)

    def body(index, ready):
        following = prepare(tokens(jnp.minimum(index + 1, groups - 1)))
        step(tokens(index), ready)
        return following

    jax.lax.fori_loop(0, groups, body, prepare(tokens(0)), unroll=shape.unroll)


def load(ref: Ref, tokens: Any, at: int) -> Array:
    """A block of 128 lanes in float32."""
    return ref[tokens, at : at + LANES].astype(jnp.float32)


def store(ref: Ref, tokens: Any, at: int, block: Array) -> None:
    """The same, back in the type of `ref`."""
    ref[tokens, at : at + LANES] = block.astype(ref.dtype)


def over_lanes(column: Array, like: Array) -> Array:
    """[tokens, 1] -> [tokens, 128]."""
    return jnp.broadcast_to(column, like.shape)


def sum_of_lanes(block: Array) -> Array:
    """[tokens, 128] -> their sums, in every lane."""
    return over_lanes(jnp.sum(block, axis=1, keepdims=True), block)


def to_rows(columns: Ref, first: int, ref: Ref) -> None:
    """Lanes `first` and on of columns [tokens, 128] -> ref [rows, tokens]."""
    for at in range(0, columns.shape[0], LANES):
        ref[:, at : at + LANES] = columns[at : at + LANES, :].T[first : first + ref.shape[0]]


def row_blocks(rows: Array, shape: Shape, index: Callable[..., Any]) -> tuple[Array, pl.BlockSpec]:
    """Rows [K, T], T a multiple of a tile, as a kernel takes them: a block of fewer than 128 lanes must be all lanes of its array."""
    if shape.tokens >= LANES:
        return rows, pl.BlockSpec((len(rows), shape.tokens), lambda *step: (0, index(*step)))
    apart = rows.reshape(len(rows), -1, shape.tokens).swapaxes(0, 1)
    return apart, pl.BlockSpec((None, len(rows), shape.tokens), lambda *step: (index(*step), 0, 0))


def to_columns(rows: Ref, columns: Ref) -> None:
    """Rows [a multiple of 8, tokens] -> the first lanes of columns [tokens, 128]."""
    size = min(LANES, columns.shape[0])
    for at in range(0, columns.shape[0], size):
        columns[at : at + size, : rows.shape[0]] = rows[:, at : at + size].T


def padded(x: Array, shape: Shape, axis: int) -> Array:
    """As many tokens as whole tiles have, the last ones zero: the array itself where they come out even."""
    missing = -x.shape[axis] % shape.tokens
    return jnp.pad(x, [(0, missing if k == axis else 0) for k in range(x.ndim)]) if missing else x
