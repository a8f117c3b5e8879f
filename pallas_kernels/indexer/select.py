"""From scores to what a query attends to: which keys, which pages. No scores are computed here."""

import jax
import jax.numpy as jnp

from pallas_kernels.choose import Kernels
from pallas_kernels.indexer import xla
from pallas_kernels.indexer.pieces import by_chunk, rows_at_once
from pallas_kernels.visible import PAGE, Selected, Span

Array = jax.Array


def select_tokens(kernels: Kernels, q: Array, k: Array, weight: Array, span: Span, top_k: int, query_chunk: int) -> Selected:
    """See `api.select_tokens`."""
    keys = k.shape[1]
    if top_k >= keys:  # everything that is visible is selected
        count = _visible(span, keys)
        index = span.first[..., None] + jnp.arange(keys, dtype=jnp.int32)[None, None]
        return Selected(jnp.where(jnp.arange(keys)[None, None] < count[..., None], index, 0), count)

    def of_chunk(piece: tuple[Array, Array, Span]) -> Selected:
        q, weight, span = piece
        return _selected(kernels.top_indices(kernels.index_scores(q, k, weight, span), top_k), keys)

    return by_chunk(of_chunk, (q, weight, span), rows_at_once(query_chunk, q.shape[0], keys))


def select_pages(kernels: Kernels, q: Array, k: Array, weight: Array, span: Span, pages: int, query_chunk: int) -> Selected:
    """See `api.select_pages`."""
    scores = kernels.page_scores(q, k, weight, span, query_chunk)
    batch, groups, total = scores.shape
    own = jnp.where(span.stop > span.first, (span.stop - 1) // PAGE, -1)
    own = jnp.pad(own, ((0, 0), (0, groups * PAGE - own.shape[1])), constant_values=-1).reshape(batch, groups, PAGE, 1)
    is_own = (own == jnp.arange(total, dtype=jnp.int32)[None, None, None]).any(axis=2)
    return _selected(xla.top_indices(jnp.where(is_own, jnp.inf, scores), min(pages, total)), total)


def _visible(span: Span, keys: int) -> Array:
    """How many keys each query sees."""
    return jnp.maximum(jnp.minimum(span.stop, keys) - span.first, 0)


def _selected(index: Array, total: int) -> Selected:
    """Of rising indices, of which those that are `total` stand for nothing."""
    valid = index < total
    return Selected(jnp.where(valid, index, 0), valid.sum(axis=-1, dtype=jnp.int32))
