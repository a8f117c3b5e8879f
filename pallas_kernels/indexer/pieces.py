"""Queries chunk by chunk and keys block by block, so that what grows with queries times keys exists for one piece at a time."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.visible import PAGE, Span

Array = jax.Array

KEY_BLOCK = 1024  # keys of which one head's products exist: a block of 512 queries stays within a TPU's or CPU's fast memory
AT_ONCE = 1 << 26  # numbers that one chunk's array may have: 256 MiB of float32


def rows_at_once(wanted: int, batch: int, numbers: int) -> int:
    """Queries of a chunk: those wanted, or fewer (multiples of PAGE, if not below it) where batch * numbers of each are too many."""
    most = max(AT_ONCE // (batch * numbers), 1)
    return min(wanted, most // PAGE * PAGE or most)


def by_chunk(f: Callable[..., Any], arrays: Any, rows: int) -> Any:
    """f of `rows` queries at a time: arrays and results have queries on axis 1. Queries that fill up the last chunk are zeros.

    With fewer queries than `rows`, f is called once, for all.
    """
    length = jax.tree.leaves(arrays)[0].shape[1]
    if length <= rows:
        return f(arrays)
    _, results = scan_chunks(lambda carry, piece: (carry, f(piece)), None, arrays, rows)
    return results


def scan_chunks(f: Callable[[Any, Any], tuple[Any, Any]], carry: Any, arrays: Any, rows: int) -> tuple[Any, Any]:
    """As `by_chunk`, with a carry from chunk to chunk: f(carry, piece) -> (carry, results)."""
    length = jax.tree.leaves(arrays)[0].shape[1]
    rows = min(rows, length)
    chunks = -(-length // rows)
    padded = jax.tree.map(partial(pad_axis, axis=1, size=chunks * rows), arrays)

    def step(carry, start):
        return f(carry, jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, rows, axis=1), padded))

    carry, results = jax.lax.scan(step, carry, jnp.arange(chunks, dtype=jnp.int32) * rows)
    return carry, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], chunks * rows, *x.shape[3:])[:, :length], results)


def key_block(keys: int) -> int:
    """Keys of a block: a multiple of PAGE."""
    return min(KEY_BLOCK, -(-keys // PAGE) * PAGE)


def over_keys(f: Callable[[Array, Any], Any], carry: Any, keys: int, span: Span) -> Any:
    """f(start, carry) -> carry for each block of keys that any query of this span [B, C] sees, from the first to the last.

    Results are written into the carry, by `put`, at `start`; blocks that no one sees stay as they are.
    """
    block = key_block(keys)
    seen = span.first < span.stop
    low, high = jnp.min(jnp.where(seen, span.first, keys)), jnp.max(jnp.where(seen, span.stop, 0))

    def step(number, carry):
        start = number * block
        return jax.lax.cond((start < high) & (start + block > low), f, lambda _, carry: carry, start, carry)

    return jax.lax.fori_loop(0, -(-keys // block), step, carry)


def seen_in_block(span: Span, start: Array | int, block: int) -> Array:
    """bool [B, C, block]: which of the keys start, start + 1, ... each query sees."""
    j = start + jnp.arange(block, dtype=jnp.int32)[None, None]
    return (j >= span.first[..., None]) & (j < span.stop[..., None])


def take(x: Array, start: Array, size: int, axis: int) -> Array:
    """x[start : start + size] along an axis."""
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def put(x: Array, piece: Array, start: Array, axis: int) -> Array:
    """x with a piece of it replaced."""
    return jax.lax.dynamic_update_slice_in_dim(x, piece.astype(x.dtype), start, axis)


def pad_axis(x: Array, axis: int, size: int) -> Array:
    """x with zeros up to this size."""
    if x.shape[axis] == size:
        return x
    return jnp.pad(x, [(0, size - x.shape[axis] if a == axis else 0) for a in range(x.ndim)])


def pad_keys(x: Array, axis: int) -> Array:
    """x with zeros up to a whole number of key blocks."""
    block = key_block(x.shape[axis])
    return pad_axis(x, axis, -(-x.shape[axis] // block) * block)
