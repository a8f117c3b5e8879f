"""The indexer's loss over all visible keys, of the warm-up with dense attention (arXiv 2512.02556, Eq. 3).

The gradient is computed on the spot, chunk by chunk of queries, while a chunk's scores and probabilities exist, and scaled by the cotangent
in the backward pass. Attention's own arrays are constants here: they have no gradient.
"""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.indexer.divergence import divergence
from pallas_kernels.indexer.pieces import key_block, over_keys, pad_keys, put, rows_at_once, scan_chunks, seen_in_block, take
from pallas_kernels.indexer.xla import block_scores, heads_first
from pallas_kernels.visible import Span

Array = jax.Array
Main = tuple[Array, Array, Array, Array, Array]  # q_nope, q_rope, k_nope, k_rope, log_total


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def dense_loss(scale: float, query_chunk: int, q: Array, k: Array, weight: Array, main: Main, first: Array) -> Array:
    """See `api.dense_indexer_loss`."""
    return _loss(scale, query_chunk, q, k, weight, main, first, False)[0]


def _dense_loss_fwd(scale, query_chunk, q, k, weight, main, first):
    return _loss(scale, query_chunk, q, k, weight, main, first, True)


def _dense_loss_bwd(scale, query_chunk, gradients, g):
    return *((g * d).astype(d.dtype) for d in gradients), None, None


dense_loss.defvjp(_dense_loss_fwd, _dense_loss_bwd)


def _loss(scale, query_chunk, q, k, weight, main, first, differentiate):
    """The loss, and its gradients for q, k and weight."""
    batch, keys, block = q.shape[0], k.shape[1], key_block(k.shape[1])
    q_nope, q_rope, k_nope, k_rope, log_total = main
    stop = jnp.broadcast_to(jnp.arange(1, keys + 1, dtype=jnp.int32)[None], first.shape)
    queries = (q, weight, q_nope.swapaxes(1, 2), q_rope.swapaxes(1, 2), log_total.swapaxes(1, 2), Span(first, stop))
    padded, k_nope, k_rope = pad_keys(k, 1), pad_keys(k_nope, 2), pad_keys(k_rope, 1)

    def of_chunk(carry, piece):
        q, weight, q_nope, q_rope, log_total, span = piece
        by_head = heads_first(q), heads_first(weight)
        main_by_head = heads_first(q_nope), heads_first(q_rope), heads_first(log_total)
        rows = (batch, q.shape[1], padded.shape[1])

        def add(start, found):
            p, scores = found
            seen = seen_in_block(span, start, block)
            piece = block_scores(*by_head, take(padded, start, block, 1))
            heads = _probabilities(*main_by_head, take(k_nope, start, block, 2), take(k_rope, start, block, 1), scale)
            return put(p, jnp.where(seen, heads, 0), start, 2), put(scores, jnp.where(seen, piece, -jnp.inf), start, 2)

        empty = jnp.zeros(rows, weight.dtype), jnp.full(rows, -jnp.inf, weight.dtype)
        loss, d_scores = divergence(*over_keys(add, empty, keys, span))
        total, d_k = carry
        if not differentiate:
            return (total + loss, d_k), None

        def back(start, found):
            d_q, d_weight, d_k = found
            more = block_gradients(*by_head, take(padded, start, block, 1), take(d_scores, start, block, 2))
            return d_q + more[0], d_weight + more[1], put(d_k, take(d_k, start, block, 1) + more[2], start, 1)

        nothing = jnp.zeros(by_head[0].shape, weight.dtype), jnp.zeros_like(by_head[1]), d_k
        d_q, d_weight, d_k = over_keys(back, nothing, keys, span)
        return (total + loss, d_k), (jnp.moveaxis(d_q, 0, 2).astype(q.dtype), jnp.moveaxis(d_weight, 0, 2))

    d_k = jnp.zeros(padded.shape if differentiate else (0,), weight.dtype)
    rows = rows_at_once(query_chunk, batch, padded.shape[1])
    (total, d_k), of_queries = scan_chunks(of_chunk, (jnp.zeros((), weight.dtype), d_k), queries, rows)
    if not differentiate:
        return total, None
    d_q, d_weight = of_queries
    return total, (d_q, d_k[:, :keys].astype(k.dtype), d_weight)


def _probabilities(q_nope, q_rope, log_total, k_nope, k_rope, scale):
    """Sum over heads of exp(logit - log_total): heads first [H, B, C, ...], keys [B, H, N, D] and [B, N, R] -> [B, C, N], not masked."""
    wide = log_total.dtype

    def add(total, head):
        q_nope, q_rope, log_total, k_nope = head
        dots = jnp.einsum("bcd,bnd->bcn", q_nope, k_nope, preferred_element_type=wide)
        dots += jnp.einsum("bcr,bnr->bcn", q_rope, k_rope, preferred_element_type=wide)
        return total + jnp.exp(dots * scale - log_total[..., None]), None

    start = jnp.zeros((*q_nope.shape[1:3], k_rope.shape[1]), wide)
    return jax.lax.scan(add, start, (q_nope, q_rope, log_total, k_nope.swapaxes(0, 1)))[0]


def block_gradients(q: Array, weight: Array, k: Array, d_scores: Array) -> tuple[Array, Array, Array]:
    """Of `xla.block_scores`: gradients for q [J, B, C, I], weight [J, B, C] and k [B, N, I], in the weights' type."""

    def add(d_k, head):
        q, weight = head
        dots = jnp.maximum(jnp.einsum("bci,bni->bcn", q, k, preferred_element_type=weight.dtype), 0)
        d_weight = (dots * d_scores).sum(axis=-1)
        d_dots = jnp.where(dots > 0, d_scores * weight[..., None], 0).astype(q.dtype)
        d_q = jnp.einsum("bcn,bni->bci", d_dots, k, preferred_element_type=weight.dtype)
        return d_k + jnp.einsum("bcn,bci->bni", d_dots, q, preferred_element_type=weight.dtype), (d_q, d_weight)

    d_k, (d_q, d_weight) = jax.lax.scan(add, jnp.zeros(k.shape, weight.dtype), (q, weight))
    return d_q, d_weight, d_k
