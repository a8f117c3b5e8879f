"""Queries that have keys of their own on TPU: latents fetched row by row into VMEM, and what the kernels of single tokens share.

A row is one DMA, and starting it takes the scalar core several cycles. So the rows of the next query are started on while this one's matrix
products run: both stand in one straight piece of code, for one tile of keys after the other. A grid step has two queries, with a buffer
each, so that the compiler sees that what is fetched is not what is read.

Rows of bfloat16 cannot be copied alone, as two share a word. They are packed into words of their own first, two columns each.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu import tiles
from pallas_kernels.tpu.tiles import LANES, Interpret

Array = jax.Array
TILE = 256  # keys whose products are worked on while as many rows are started on


@dataclass(frozen=True)
class Steps:
    """The grid of one call, (cores, steps of a core): two queries a step."""

    cores: int
    each: int  # steps of a core
    keys: int  # of a query, whole tiles

    @property
    def grid(self) -> tuple[int, int]:
        """Cores, steps."""
        return self.cores, self.each

    def by_step(self, *block: int) -> pl.BlockSpec:
        """Of an array of one entry a query, those of a step."""
        return pl.BlockSpec((2, *block), lambda c, i, *_: (c * self.each + i, *(0,) * len(block)))

    @property
    def rows(self) -> list[pl.BlockSpec]:
        """Indices [Q, 1, keys] of the even and the odd query of a step, and the even one of the next.

        Apart: places in one row of SMEM take less to compute.
        """

        def spec(query: int) -> pl.BlockSpec:
            def place(c: Any, i: Any, *_: Any) -> tuple[Any, int, int]:
                return 2 * (c * self.each + jnp.minimum(i + query // 2, self.each - 1)) + query % 2, 0, 0

            return pl.BlockSpec((1, 1, self.keys), place, memory_space=pltpu.SMEM)

        return [spec(query) for query in range(3)]

    def buffers(self, lines: int) -> list[Any]:
        """Scratch for the words of the even and of the odd query, and what says that they arrived."""
        return [*[pltpu.VMEM((self.keys, lines, LANES), jnp.int32)] * 2, pltpu.SemaphoreType.DMA((2,))]


def steps_of(queries: int, chosen: int) -> Steps:
    """For an even number of queries."""
    cores = tiles.chip().cores if queries // 2 % tiles.chip().cores == 0 else 1
    return Steps(cores, queries // 2 // cores, tiles.round_up(chosen, TILE))


def rows_of(index: Array, keys: int, length: int) -> Array:
    """Indices [B, C, k] in latents of `length` a sequence -> [B C, 1, keys] in one row of all sequences' latents."""
    sequence = jnp.arange(len(index), dtype=jnp.int32)[:, None, None] * length
    return (jnp.pad(index, ((0, 0), (0, 0), (0, keys - index.shape[-1]))) + sequence).reshape(-1, 1, keys)


def filled(x: Array, width: int) -> Array:
    """[B, C, H, W] -> [B C, H, width], zeros appended."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - x.shape[-1]))).reshape(-1, x.shape[2], width)


def packed(latent: Array, rank: int, *, interpret: Interpret = False) -> Array:
    """Latents [B, T, K+R] bfloat16 -> words [B, T, s, 128] int32: column j < K/2 in a word's low half, j + K/2 in its high half.

    The R others follow in words of their own. s is a power of two, so that a row lies in one piece.
    """
    del interpret  # no kernel
    half = jax.lax.bitcast_convert_type(latent, jnp.uint16).astype(jnp.uint32)
    low, high, rest = half[..., : rank // 2], half[..., rank // 2 : rank], half[..., rank:]
    lines = pl.next_power_of_2(rank // (2 * LANES) + 1)
    word = jnp.concatenate([low | (high << 16), rest], axis=-1)
    word = jnp.pad(word, ((0, 0), (0, 0), (0, lines * LANES - word.shape[-1])))
    return jax.lax.bitcast_convert_type(word, jnp.int32).reshape(*latent.shape[:2], lines, LANES)


def each_query(
    index: tuple[Any, Any, Any], words: Any, buffers: tuple[Any, Any], arrived: Any, unroll: bool
) -> Callable[[Callable[..., None]], None]:
    """Runs f(query, fetch) for both queries of a step, whose rows then stand in buffers[query].

    f must call fetch(begin) for every tile of keys, which starts on those of the next query.
    """
    step, steps, keys = pl.program_id(1), pl.num_programs(1), buffers[0].shape[0]

    def start(index: Any, begin: Any, number: int, slot: int, unroll: bool) -> None:
        def one(i: Any, _: Any) -> Any:
            pltpu.make_async_copy(words.at[index[0, 0, begin + i]], buffers[slot].at[begin + i], arrived.at[slot]).start()
            return _

        jax.lax.fori_loop(0, number, one, 0, unroll=unroll)

    def wait(slot: int) -> None:
        pltpu.make_async_copy(buffers[slot], buffers[slot], arrived.at[slot]).wait()  # as many bytes as all rows have

    def run(f: Callable[..., None]) -> None:
        @pl.when(step == 0)
        def _() -> None:
            start(index[0], 0, keys, 0, False)

        for query in range(2):
            wait(query)
            f(query, lambda begin, query=query: start(index[1 + query], begin, TILE, 1 - query, unroll))

        @pl.when(step == steps - 1)
        def _() -> None:
            wait(0)

    return run


def unpacked(words: Any, begin: Any, rank: int) -> tuple[Array, Array]:
    """TILE rows of words [k, s, 128] in VMEM -> the first K columns [TILE, K] and the others, filled up to [TILE, 128], bfloat16."""
    lines = rank // (2 * LANES)
    apart = words.shape[1]
    flat = words.reshape(-1, LANES)
    parts = [flat[pl.ds(begin * apart + line, TILE, stride=apart), :] for line in range(lines + 1)]
    low, high = [_half(part << 16) for part in parts], [_half(part & -65536) for part in parts[:-1]]
    return jnp.concatenate([*low[:-1], *high], axis=1), low[-1]


def to_row(column: Array) -> Array:
    """[heads, 1] -> [1, heads], by the diagonal."""
    heads = column.shape[0]
    return jnp.sum(jnp.where(_diagonal(heads), jnp.broadcast_to(column, (heads, heads)), 0.0), axis=0, keepdims=True)


def to_column(row: Array) -> Array:
    """The inverse of `to_row`."""
    heads = row.shape[1]
    return jnp.sum(jnp.where(_diagonal(heads), jnp.broadcast_to(row, (heads, heads)), 0.0), axis=1, keepdims=True)


def _half(word: Array) -> Array:
    return jax.lax.bitcast_convert_type(word, jnp.float32).astype(jnp.bfloat16)


def _diagonal(heads: int) -> Array:
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (heads, heads), axis) for axis in (0, 1))
    return row == column
