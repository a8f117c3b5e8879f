"""Scores of a few queries and keys on TPU, heads added up in registers; what the kernels that need scores share.

Queries come heads first, which XLA makes the layout of what computes them. 64 queries of each of 16 heads, below one another, are the
rows of one product, and nothing is moved. Between a product and the sum stand three vector operations: its positive part, times a column
of weights, added. The matrix units need as long for it or longer, as I is 128 and their depth 128 (v5e, v5p) or 256 (v6e, tpu7x, of which
half is then idle).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.indexer.xla import masked
from pallas_kernels.tpu.tiles import Chip, divisor, round_up
from pallas_kernels.visible import PAGE, Span

Array = jax.Array
Ref = Any

ROWS = PAGE  # queries of a tile
KEYS = 1024  # keys of a tile
QUERY_BLOCK = 512  # queries that a grid step holds in VMEM
HEADS = 16  # of one product


@dataclass(frozen=True)
class Shape:
    """Sizes of one call. A grid step has `queries` and `keys`, tiles of ROWS and KEYS; `causal`: query i sees no key after key i."""

    heads: int
    size: int
    queries: int
    keys: int
    query_blocks: int
    key_blocks: int
    causal: bool
    cores: int

    @property
    def groups(self) -> int:
        """Of ROWS queries each, in a grid step."""
        return self.queries // ROWS

    def block(self, step: Any) -> Any:
        """The block of queries of a step of the grid's first axis. Two cores share that axis in halves: each gets every other block."""
        half = -(-self.query_blocks // 2)
        return step if self.cores == 1 else jnp.where(step < half, 2 * step, 2 * (step - half) + 1)

    def last_key_block(self, block: Any) -> Any:
        """The last block of keys that a block of queries may see."""
        last = self.key_blocks - 1
        return jnp.minimum((block * self.queries + self.queries - 1) // self.keys, last) if self.causal else last


@dataclass(frozen=True)
class Operands:
    """What the kernels read: queries filled up to whole blocks, and to whole tiles in it; keys likewise."""

    shape: Shape
    bounds: Array  # int32 [2, B, S / ROWS]: of each group of queries, the first visible key and one after the last
    q: Array  # [B, J, S, I]
    k: Array  # [B, T, I]
    # float32 [B, S, J + 2]: weights, then the span (numbers below 2^24 are exact). In HBM a row of columns fills 128 lanes anyway.
    columns: Array


def operands(
    q: Array, k: Array, weight: Array, span: Span, chip: Chip, *, most_queries: int, most_keys: int, causal: bool = False
) -> Operands:
    """Lays the arguments of `index_scores` out for the kernels, in grid steps of so many queries and keys."""
    (batch, length, heads, size), keys = q.shape, k.shape[1]
    queries = min(most_queries, round_up(length, ROWS))
    block = min(most_keys, round_up(keys, KEYS))
    rows, columns = round_up(length, queries), round_up(keys, block)
    shape = Shape(heads, size, queries, block, rows // queries, columns // block, causal, chip.cores)
    fill = ((0, 0), (0, rows - length), (0, 0))
    first, stop = (jnp.pad(x, fill[:2]) for x in span)
    low = jnp.where(first < stop, first, keys).reshape(batch, -1, ROWS).min(axis=2)
    high = jnp.where(first < stop, stop, 0).reshape(batch, -1, ROWS).max(axis=2)
    beside = jnp.stack([first, stop], axis=2).astype(jnp.float32)
    return Operands(
        shape,
        jnp.stack([low, high]),
        jnp.pad(q.swapaxes(1, 2), ((0, 0), *fill)),
        jnp.pad(k, ((0, 0), (0, columns - keys), (0, 0))),
        jnp.concatenate([jnp.pad(weight, fill), beside], axis=2),
    )


def scores_of(shape: Shape, q: Ref, k: Array, columns: Ref, rows: Any, start: Any) -> Array:
    """Scores [ROWS, KEYS] of the queries `rows` of a block and of keys k [KEYS, I], which begin at key `start`; -inf where not visible."""
    total = jnp.zeros((ROWS, KEYS), jnp.float32)
    together = divisor(shape.heads, HEADS)
    for head in range(0, shape.heads, together):
        heads = range(head, head + together)
        stacked = jnp.concatenate([q[0, j, rows, :] for j in heads], axis=0)
        dots = jax.lax.dot_general(stacked, k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        for j in range(together):
            weight = columns[0, rows, head + j : head + j + 1]
            total += jnp.maximum(dots[j * ROWS : (j + 1) * ROWS], 0) * weight
    key = (start + jax.lax.broadcasted_iota(jnp.int32, (ROWS, KEYS), 1)).astype(jnp.float32)
    first, stop = (columns[0, rows, shape.heads + i : shape.heads + i + 1] for i in range(2))
    return masked(total, (key >= first) & (key < stop))


def for_visible_tiles(shape: Shape, bounds: Ref, f: Callable[[Any, Any, Any, Any], None]) -> None:
    """f(group, rows, keys, start) for each tile of a grid step in which a pair is visible: which ROWS queries, where they and the keys lie
    in their blocks, and the first key. That a tile lies after the diagonal, which the grid alone tells, is asked apart from the spans."""
    block, batch, key_block = shape.block(pl.program_id(0)), pl.program_id(1), pl.program_id(2)

    def step(index: Any, carry: None) -> None:
        group, part = index % shape.groups, index // shape.groups
        of_all = block * shape.groups + group
        start = key_block * shape.keys + part * KEYS

        def of_tile() -> None:
            @pl.when((start < bounds[1, batch, of_all]) & (start + KEYS > bounds[0, batch, of_all]))
            def _() -> None:
                rows, keys = (pl.ds(pl.multiple_of(i * size, size), size) for i, size in ((group, ROWS), (part, KEYS)))
                f(group, rows, keys, start)

        if shape.causal:
            pl.when(start < (of_all + 1) * ROWS)(of_tile)
        else:
            of_tile()

    jax.lax.fori_loop(0, shape.keys // KEYS * shape.groups, step, None)


def specs(shape: Shape) -> list[pl.BlockSpec]:
    """Of queries, keys and columns, on the grid (query block, batch, key block)."""

    def of_queries(i: Any, b: Any, n: Any, _: Ref) -> tuple[Any, Any, int]:
        return b, shape.block(i), 0

    def of_keys(i: Any, b: Any, n: Any, _: Ref) -> tuple[Any, Any, int]:
        return b, jnp.minimum(n, shape.last_key_block(shape.block(i))), 0

    return [
        pl.BlockSpec((1, shape.heads, shape.queries, shape.size), lambda i, b, n, _: (b, 0, shape.block(i), 0)),
        pl.BlockSpec((1, shape.keys, shape.size), of_keys),
        pl.BlockSpec((1, shape.queries, shape.heads + 2), of_queries),
    ]
