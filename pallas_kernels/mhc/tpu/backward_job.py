"""What is static for one backward kernel, and the arithmetic that its stages share."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.mhc.spec import Mapping
from pallas_kernels.mhc.tpu.tiles_backward import LANES, Tiles

Ref = Any
NORM_ROWS = 8  # rows below g's terms that hold the terms of one more number
CONTRACT_LAST = (((1,), (1,)), ((), ()))


@dataclass(frozen=True)
class Job:
    """What is static for one kernel: which parts of a seam it differentiates, and sizes."""

    mapping: Mapping
    tiles: Tiles
    width: int
    tokens: int
    post: bool
    pre: bool
    interpret: bool

    @property
    def n(self) -> int:
        return self.mapping.n

    @property
    def mixes(self) -> bool:
        """Whether x' is a mixture of streams."""
        return self.post and self.mapping.mixes

    @property
    def ragged(self) -> bool:
        """Whether the last tile has rows that are no tokens."""
        return self.tokens % self.tiles.tokens != 0

    def rows(self, start: Any, first: int, size: int) -> Any:
        """Tokens from `start` + `first` on; `start` is a multiple of a Gram block."""
        return pl.ds((start if isinstance(start, int) else pl.multiple_of(start, self.tiles.gram)) + first, size)

    def lane(self, i: int, start) -> Any:
        """Where lanes of stream i from `start` on begin."""
        at = i * self.width + start
        return at if isinstance(at, int) else pl.multiple_of(at, LANES)


class Coefficients:
    """Where `spread` put the coefficients: rows of pre, post, res (row-major) and, last, the weight of x' in its own gradient."""

    def __init__(self, job: Job):
        n = job.n
        self.pre, self.post, self.res = 0, n, 2 * n
        self.norm = 2 * n + (n * n if job.mixes else 0)
        self.rows = self.norm + 1


def dot(a: jax.Array, b: jax.Array, dimensions=(((1,), (0,)), ((), ())), interpret: bool = False) -> jax.Array:
    """A product of matrices with float32 sums: one pass for bfloat16, as many as float32 needs otherwise."""
    if interpret:  # a CPU does not have all of these products for bfloat16
        a, b = wide(a), wide(b)
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def wide(x: jax.Array) -> jax.Array:
    """In float32."""
    return x.astype(jnp.float32)


def terms(block: jax.Array, count: int) -> list[jax.Array]:
    """float32 as a sum of float32 numbers that are bfloat16 ones: 8 bits each, so that 2 leave 2^-17 of a number and 3 nothing."""
    found: list[jax.Array] = []
    for _ in range(count):
        found.append(wide(block.astype(jnp.bfloat16)))
        block = block - found[-1]
    return found


def iota(shape: tuple[int, int], axis: int) -> jax.Array:
    """Every entry's index along one axis."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def repeat(count: int, body: Callable[[Any, int], int], unroll: int) -> None:
    """body(i, 0) for every i below `count`; unrolled all the way, indices are numbers."""
    if unroll < count:
        jax.lax.fori_loop(0, count, body, 0, unroll=unroll)
        return
    for i in range(count):
        body(i, 0)


def total(blocks: Iterable[jax.Array]) -> jax.Array:
    """Their sum, in order."""
    return reduce(jnp.add, blocks)
