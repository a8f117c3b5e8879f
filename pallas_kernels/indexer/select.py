"""From scores to what a query attends to: which keys, which pages. No scores are computed here."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.choose import Kernels
from pallas_kernels.indexer import xla
from pallas_kernels.indexer.pieces import put, rows_at_once
from pallas_kernels.visible import PAGE, Selected, Span

Array = jax.Array

ENDS = 16  # at most: each has kernels of its own to be compiled, and more of them would leave out little more
LEAST = 8192  # keys from one to the next


def select_tokens(kernels: Kernels, q: Array, k: Array, weight: Array, span: Span, top_k: int, query_chunk: int) -> Selected:
    """See `api.select_tokens`.

    In self-attention a chunk of queries looks at the keys up to one of a few static ends alone: what lies after its own end, none of its
    queries sees.
    """
    batch, length, keys = *q.shape[:2], k.shape[1]
    if top_k >= keys:  # everything that is visible is selected
        return _everything(span, keys, keys)
    ends = ends_of(length) if length == keys else [keys]
    rows = min(rows_at_once(query_chunk, batch, keys), length)

    def of_keys(seen: int, q: Array, weight: Array, span: Span) -> Selected:
        if seen <= top_k:
            return _everything(span, seen, top_k)
        return _selected(kernels.top_indices(kernels.index_scores(q, k[:, :seen], weight, span), top_k), seen)

    def of_chunk(begin: Any, chosen: Selected) -> Selected:
        piece = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, begin, rows, axis=1), (q, weight, span))
        branches = [partial(of_keys, end) for end in ends]
        found = jax.lax.switch((begin + rows - 1) // ends[0], branches, *piece) if len(ends) > 1 else branches[0](*piece)
        return jax.tree.map(partial(put, start=begin, axis=1), chosen, found)

    chosen = Selected(jnp.zeros((batch, length, top_k), jnp.int32), jnp.zeros((batch, length), jnp.int32))
    if rows == length:
        return of_chunk(0, chosen)
    # The last chunk begins early enough to be whole: a few queries are done twice.
    return jax.lax.fori_loop(0, -(-length // rows), lambda i, chosen: of_chunk(jnp.minimum(i * rows, length - rows), chosen), chosen)


def ends_of(length: int) -> list[int]:
    """Where the keys may end that a chunk of self-attention looks at: multiples of the first, but for the last."""
    size = -(-length // max(1, min(ENDS, length // LEAST)))
    return [min(start + size, length) for start in range(0, length, size)]


def select_pages(kernels: Kernels, q: Array, k: Array, weight: Array, span: Span, pages: int, query_chunk: int) -> Selected:
    """See `api.select_pages`."""
    scores = kernels.page_scores(q, k, weight, span, query_chunk)
    batch, groups, total = scores.shape
    own = jnp.where(span.stop > span.first, (span.stop - 1) // PAGE, -1)
    own = jnp.pad(own, ((0, 0), (0, groups * PAGE - own.shape[1])), constant_values=-1).reshape(batch, groups, PAGE, 1)
    is_own = (own == jnp.arange(total, dtype=jnp.int32)[None, None, None]).any(axis=2)
    return _selected(xla.top_indices(jnp.where(is_own, jnp.inf, scores), min(pages, total)), total)


def _everything(span: Span, keys: int, width: int) -> Selected:
    """All of the keys that is visible, in rows of `width`."""
    count = _visible(span, keys)
    place = jnp.arange(width, dtype=jnp.int32)[None, None]
    return Selected(jnp.where(place < count[..., None], span.first[..., None] + place, 0), count)


def _visible(span: Span, keys: int) -> Array:
    """How many keys each query sees."""
    return jnp.maximum(jnp.minimum(span.stop, keys) - span.first, 0)


def _selected(index: Array, total: int) -> Selected:
    """Of rising indices, of which those that are `total` stand for nothing."""
    valid = index < total
    return Selected(jnp.where(valid, index, 0), valid.sum(axis=-1, dtype=jnp.int32))
