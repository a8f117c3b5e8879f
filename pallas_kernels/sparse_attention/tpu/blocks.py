"""Blocks of queries on TPU: the latents of a block's pages fetched into VMEM ahead of time, and which query sees which of them.

The grid is (cores, blocks of a core, groups of a block's queries). At a block's first group the next block's pages are started on, page by
page, each a DMA of PAGE latents; at the next block's first group they are waited for all at once.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.sparse_attention.spec import NO_KEYS
from pallas_kernels.tpu import tiles
from pallas_kernels.visible import PAGE

Array = jax.Array
SUBLANES = 8  # least queries of a group: a tile of 32-bit numbers
ROWS = 1024  # rows (heads of queries) of a group, from which on the matrix units are well used


@dataclass(frozen=True)
class Shape:
    """Sizes of one call; hashable, so that a kernel can be made for it."""

    heads: int
    rank: int  # columns of a latent that are values too
    width: int  # of a latent
    keys: int  # of a block: its pages, an even number of them
    blocks: int  # of one core
    cores: int
    queries: int  # of a group

    @property
    def rows(self) -> int:
        """Rows of a group."""
        return self.queries * self.heads

    @property
    def grid(self) -> tuple[int, int, int]:
        """Cores, blocks, groups."""
        return self.cores, self.blocks, PAGE // self.queries

    def by_group(self, *block: int) -> pl.BlockSpec:
        """Of an array of one entry a query, a group's."""
        groups, zeros = PAGE // self.queries, (0,) * len(block)
        return pl.BlockSpec((self.queries, *block), lambda c, b, g, *_: ((c * self.blocks + b) * groups + g, *zeros))

    def by_block(self, *block: int) -> pl.BlockSpec:
        """Of an array of one entry a block, a block's."""
        zeros = (0,) * len(block)
        return pl.BlockSpec((1, *block), lambda c, b, g, *_: (c * self.blocks + b, *zeros))

    @property
    def buffers(self) -> list[Any]:
        """Scratch for latents, of this block and of the next."""
        return [pltpu.VMEM((2, self.keys, self.width), jnp.bfloat16), pltpu.SemaphoreType.DMA((2,))]


def shape_of(q: Array, rank: int, pages: int) -> Shape:
    """Sizes for q [B, C, H, W] and so many pages a block."""
    batch, length, heads, width = q.shape
    blocks = batch * length // PAGE
    cores = tiles.chip().cores if blocks % tiles.chip().cores == 0 else 1
    return Shape(heads, rank, width, _keys(pages), blocks // cores, cores, _queries(heads))


def vmem_misfit(heads: int, width: int, pages: int) -> str | None:
    """What about so many heads and pages a block does not fit into the VMEM of the chip that is traced for."""
    rows, keys, lanes = _queries(heads) * heads, _keys(pages), tiles.round_up(width, tiles.LANES)
    logits, gradients, queries = rows * keys * 8, keys * lanes * 12, rows * lanes * 16  # of the backward kernel, which needs more
    needed, most = logits + gradients + queries, tiles.vmem_limit(tiles.chip())
    if needed <= most:
        return None
    return f"{pages} pages and {heads} heads need {needed // tiles.MIB} MiB of VMEM, of which a kernel may use {most // tiles.MIB} MiB"


def _queries(heads: int) -> int:
    """Queries of a group."""
    queries = SUBLANES
    while 2 * queries <= PAGE and 2 * queries * heads <= ROWS:
        queries *= 2
    return queries


def _keys(pages: int) -> int:
    """Keys of a block: of an even number of pages, which fill whole lanes."""
    return (pages + pages % 2) * PAGE


def page_arguments(shape: Shape, latent: Array, index: Array, count: Array, first: Array, stop: Array) -> tuple[Array, Array, Array, Array]:
    """What the kernels take of pages index [B, n, p], count [B, n] and spans [B, C].

    Pages of all sequences in one row [B n, p] int32, p even; the token at every key of a block [B n, 1, keys] int32, -1 where there is
    none; spans [B C, 2]; latents [B T', W] with T' whole pages.
    """
    batch, length, width = latent.shape
    index = _filled(shape, index)
    token = jnp.where(_valid(index, count)[..., None], index[..., None] * PAGE + jnp.arange(PAGE, dtype=jnp.int32)[None, None, None], -1)
    missing = -length % PAGE
    if missing:
        latent = jnp.pad(latent, ((0, 0), (0, missing), (0, 0)))
    sequence = jnp.arange(batch, dtype=jnp.int32)[:, None, None] * ((length + missing) // PAGE)
    spans = jnp.stack([first, stop], axis=-1)
    return (
        (index + sequence).reshape(-1, index.shape[-1]),
        token.reshape(-1, 1, shape.keys),
        spans.reshape(-1, 2),
        latent.reshape(-1, width),
    )


def pages_to(shape: Shape, total: Array, index: Array, count: Array) -> Array:
    """Where the gradients of a block's pages belong, [B n, p], in `total` [B, T', W] as one row of pages: what is none, to a last page."""
    pages = total.shape[1] // PAGE
    index = _filled(shape, index)
    index = jnp.where(_valid(index, count), index, pages - 1)
    return (index + jnp.arange(len(total), dtype=jnp.int32)[:, None, None] * pages).reshape(-1, index.shape[-1])


def _filled(shape: Shape, index: Array) -> Array:
    return jnp.pad(index, ((0, 0), (0, 0), (0, shape.keys // PAGE - index.shape[-1])))


def _valid(index: Array, count: Array) -> Array:
    return jnp.arange(index.shape[-1], dtype=jnp.int32)[None, None] < count[..., None]


def latents_of_block(shape: Shape, page: Any, latent: Any, buffer: Any, arrived: Any) -> Any:
    """The latents [keys, W] of this grid step's block, in VMEM. `page` [B n, p] in SMEM, `latent` in HBM."""
    core, block, group = (pl.program_id(axis) for axis in range(3))
    slot = block % 2

    def fetch(block: Any, slot: Any) -> None:
        def one(j: Any, _: Any) -> Any:
            rows = pl.ds(page[core * shape.blocks + block, j] * PAGE, PAGE)
            pltpu.make_async_copy(latent.at[rows], buffer.at[slot, pl.ds(j * PAGE, PAGE)], arrived.at[slot]).start()
            return _

        jax.lax.fori_loop(0, shape.keys // PAGE, one, 0)

    @pl.when((block == 0) & (group == 0))
    def _() -> None:
        fetch(0, 0)

    @pl.when((block + 1 < shape.blocks) & (group == 0))
    def _() -> None:
        fetch(block + 1, 1 - slot)

    @pl.when(group == 0)
    def _() -> None:
        pltpu.make_async_copy(buffer.at[slot], buffer.at[slot], arrived.at[slot]).wait()  # as many bytes as all its pages have

    return buffer.at[slot]


def hidden(token: Any, spans: Any) -> Array:
    """What is added to the logits of a group [queries, keys]: 0, or far below NO_KEYS where a query does not see the key."""
    key = token[0]
    return jnp.where((key >= spans[:, 0:1]) & (key < spans[:, 1:2]), 0.0, 10 * NO_KEYS)


def to_rows(column: Array, shape: Shape) -> Array:
    """[queries * heads, 1] -> [queries, heads], by the diagonal of every query's square."""
    heads = shape.heads
    square = jnp.broadcast_to(column.reshape(shape.queries, heads, 1), (shape.queries, heads, heads))
    return jnp.sum(jnp.where(_diagonal(shape.queries, heads), square, 0.0), axis=1)


def to_column(rows: Array, shape: Shape) -> Array:
    """[queries, heads] -> [queries * heads, 1]: the inverse of `to_rows`."""
    heads = shape.heads
    square = jnp.broadcast_to(rows[:, None, :], (shape.queries, heads, heads))
    return jnp.sum(jnp.where(_diagonal(shape.queries, heads), square, 0.0), axis=2, keepdims=True).reshape(shape.rows, 1)


def _diagonal(queries: int, heads: int) -> Array:
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (queries, heads, heads), axis) for axis in (1, 2))
    return row == column


def product(x: Array, y: Array, contract: tuple[int, int]) -> Array:
    """x and y contracted over one axis of each, float32."""
    return jax.lax.dot_general(x, y, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=jnp.float32)
