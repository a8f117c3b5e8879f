"""What both directions on GPU share: how tokens are laid out and walked over, and which shapes shared memory has room for.

A program is one warpgroup that takes every so many tokens. A token's stream is C / 128 rows of 128 in shared memory, of which a chunk of
one to four rows is in registers at a time.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.launch import MULTIPROCESSORS, SHARED_MEMORY, Tile, layout

LANES = 128
MOST_WIDTH = 256 * LANES  # elements of one copy


@dataclass(frozen=True)
class Walk:
    """Sizes of one kernel: who takes which token, and how many are under way."""

    n: int
    width: int
    tokens: int
    stages: int
    interpret: bool

    @property
    def rows(self) -> int:
        """Rows of a stream."""
        return self.width // LANES

    @property
    def programs(self) -> int:
        return min(MULTIPROCESSORS, self.tokens)

    @property
    def steps(self) -> int:
        """Tokens of a program; where they do not come out even, the last token is taken again."""
        return -(-self.tokens // self.programs)

    @property
    def chunk(self) -> int:
        """Rows that are in registers at a time."""
        return next(c for c in (4, 2, 1) if self.rows % c == 0)

    def chunks(self) -> range:
        """Where the chunks of a stream begin."""
        return range(0, self.rows, self.chunk)

    def taken(self, step: Any) -> Any:
        """The token that this program takes in a step; it may lie beyond the last."""
        return jax.lax.axis_index("program") + step * self.programs

    def token(self, step: Any) -> Any:
        return jnp.minimum(self.taken(step), self.tokens - 1)

    def tile(self, ref: Any, streams: int) -> list[Tile]:
        """What of an array [T * streams * C / 128, 128] is this program's in a step, in copies of a stream each."""

        def start(i: int, step: Any) -> tuple[Any, int]:
            return (self.token(step) * streams + i) * self.rows, 0

        return [Tile(ref, (self.rows, LANES), partial(start, i), swizzle=0) for i in range(streams)]

    def load(self, ref: Any, at: int) -> jax.Array:
        """A chunk in float32, laid out over the threads the same for every type."""
        block = ref[pl.ds(at, self.chunk), :]
        return layout(block, plgpu.Layout.WG_STRIDED((self.chunk, LANES), vec_size=self.chunk), self.interpret).astype(jnp.float32)

    def zeros(self) -> jax.Array:
        zeros = jnp.zeros((self.chunk, LANES), jnp.float32)
        return layout(zeros, plgpu.Layout.WG_STRIDED((self.chunk, LANES), vec_size=self.chunk), self.interpret)


def walk(n: int, width: int, tokens: int, size: int, loaded: int, other: int, interpret: bool) -> Walk:
    """Sizes where a stage has `loaded` streams of elements of `size` bytes and `other` bytes are used besides.

    Raises ValueError where shared memory has no room for one token.
    """
    stages = min(4, (SHARED_MEMORY - other) // (loaded * width * size))
    if stages < 1:
        raise ValueError(f"a token of {n} streams of width {width} does not fit into shared memory: use the XLA implementation")
    return Walk(n, width, tokens, stages, interpret)


def too_large(n: int, width: int, size: int) -> str | None:
    """What is too large about a token of n streams of elements of `size` bytes; the backward kernel needs more than the forward one."""
    needed = n * width * 4 + (5 * n + 2) * width * size  # gains; gradients, and one token under way
    if needed <= SHARED_MEMORY and width <= MOST_WIDTH:
        return None
    return (
        f"a token of {n} streams of width {width} needs {needed // 1024} KiB of shared memory, of which a kernel may use "
        f"{SHARED_MEMORY // 1024} KiB"
    )


def as_rows(x: jax.Array) -> jax.Array:
    """An array whose last dimension is a multiple of 128, as rows of 128."""
    return x.reshape(-1, LANES)
