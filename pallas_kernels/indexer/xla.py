"""Scores and selection in plain XLA, for any shape, any float type and any platform.

A chunk's scores are added up head by head within a block of keys, so that no array has both heads and all keys. Blocks of keys that no
query of a chunk sees are not computed. A single query, as in decoding, has them all at once: its heads are the rows of one product.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.indexer.pieces import (
    AT_ONCE,
    by_chunk,
    key_block,
    over_keys,
    pad_axis,
    pad_keys,
    put,
    rows_at_once,
    seen_in_block,
    take,
)
from pallas_kernels.visible import PAGE, Span

Array = jax.Array


def index_scores(q: Array, k: Array, weight: Array, span: Span) -> Array:
    """`reference.index_scores`, `masked`."""
    keys, block = k.shape[1], key_block(k.shape[1])
    if q.shape[1] == 1 and q.shape[0] * q.shape[2] * keys <= AT_ONCE:
        return masked(_scores_of_one(q[:, 0], k, weight[:, 0])[:, None], seen_in_block(span, 0, keys))
    k = pad_keys(k, axis=1)
    by_head = heads_first(q), heads_first(weight)

    def add(start, scores):
        piece = block_scores(*by_head, take(k, start, block, axis=1))
        return put(scores, masked(piece, seen_in_block(span, start, block)), start, axis=2)

    scores = jnp.full((*q.shape[:2], k.shape[1]), -jnp.inf, weight.dtype)
    return over_keys(add, scores, keys, span)[..., :keys]


def page_scores(q: Array, k: Array, weight: Array, span: Span, query_chunk: int) -> Array:
    """The largest visible score of each PAGE queries and each PAGE keys: [B, ceil(S / PAGE), ceil(T / PAGE)], -inf where there is none."""
    batch, length, keys, block = *q.shape[:2], k.shape[1], key_block(k.shape[1])
    k = pad_keys(k, axis=1)
    whole = -(-length // PAGE) * PAGE
    grouped = jax.tree.map(lambda x: pad_axis(x, 1, whole).reshape(batch, -1, PAGE, *x.shape[2:]), (q, weight, span))

    def of_groups(piece):
        q, weight, span = jax.tree.map(lambda x: x.reshape(batch, -1, *x.shape[3:]), piece)
        by_head = heads_first(q), heads_first(weight)
        groups = q.shape[1] // PAGE

        def add(start, found):
            scores = masked(block_scores(*by_head, take(k, start, block, axis=1)), seen_in_block(span, start, block))
            return put(found, scores.reshape(batch, groups, PAGE, block // PAGE, PAGE).max(axis=(2, 4)), start // PAGE, axis=2)

        found = jnp.full((batch, groups, k.shape[1] // PAGE), -jnp.inf, weight.dtype)
        return over_keys(add, found, keys, span)

    rows = rows_at_once(query_chunk, batch, block)
    return by_chunk(of_groups, grouped, max(rows // PAGE, 1))[..., : -(-keys // PAGE)]


def top_indices(scores: Array, count: int) -> Array:
    """The places of the `count` largest along the last axis, rising, ties to the lower place; the axis's length for those that are -inf."""
    value, index = jax.lax.top_k(scores, count)
    return jnp.sort(jnp.where(value > -jnp.inf, index, scores.shape[-1]).astype(jnp.int32), axis=-1)


def block_scores(q: Array, weight: Array, k: Array) -> Array:
    """Heads first: q [J, B, C, I], weight [J, B, C]; k [B, N, I] -> [B, C, N] in the weights' type, nothing masked."""

    def add(total, head):
        q, weight = head
        dots = jnp.einsum("bci,bni->bcn", q, k, preferred_element_type=weight.dtype)
        return total + jnp.maximum(dots, 0) * weight[..., None], None

    return jax.lax.scan(add, jnp.zeros((*q.shape[1:3], k.shape[1]), weight.dtype), (q, weight))[0]


def _scores_of_one(q: Array, k: Array, weight: Array) -> Array:
    """q [B, J, I], k [B, T, I], weight [B, J] -> [B, T], nothing masked."""
    dots = jnp.einsum("bji,bti->bjt", q, k, preferred_element_type=weight.dtype)
    return jnp.einsum("bjt,bj->bt", jnp.maximum(dots, 0), weight, precision=jax.lax.Precision.HIGHEST)


def masked(scores: Array, visible: Array) -> Array:
    """-inf where not visible; elsewhere finite, NaN being the type's lowest number: what is visible comes before what is not.

    -0.0 becomes 0.0: sorting tells the two apart, and which of two equal scores comes first must not depend on it.
    """
    lowest = jnp.finfo(scores.dtype).min
    return jnp.where(visible, jnp.where(scores == 0, 0, jnp.where(scores > lowest, scores, lowest)), -jnp.inf)


def heads_first(x: Array) -> Array:
    """[B, C, J, ...] -> [J, B, C, ...]."""
    return jnp.moveaxis(x, 2, 0)
