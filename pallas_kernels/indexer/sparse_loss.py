"""The indexer's loss over the selected keys alone, of training with sparse attention (arXiv 2512.02556, Eq. 4).

As in `dense_loss` the gradient is computed on the spot, and attention's own arrays have none. What is gathered for a query, selected keys
times their width, exists for few queries at a time; where most keys are selected, all are looked at and the others masked.
"""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.indexer.divergence import divergence
from pallas_kernels.indexer.pieces import rows_at_once, scan_chunks
from pallas_kernels.visible import Selected, mask_of_tokens, masking_pays

Array = jax.Array
Main = tuple[Array, Array, Array, Array]  # q_nope, q_rope, key_up, latent


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def sparse_loss(scale: float, query_chunk: int, q: Array, k: Array, weight: Array, main: Main, selected: Selected) -> Array:
    """See `api.sparse_indexer_loss`."""
    return _loss(scale, query_chunk, q, k, weight, main, selected, False)[0]


def _sparse_loss_fwd(scale, query_chunk, q, k, weight, main, selected):
    return _loss(scale, query_chunk, q, k, weight, main, selected, True)


def _sparse_loss_bwd(scale, query_chunk, gradients, g):
    return *((g * d).astype(d.dtype) for d in gradients), None, None


sparse_loss.defvjp(_sparse_loss_fwd, _sparse_loss_bwd)


def _loss(scale, query_chunk, q, k, weight, main, selected, differentiate):
    """The loss, and its gradients for q, k and weight."""
    q_nope, q_rope, key_up, latent = main
    (batch, _, heads, size), chosen = q.shape, selected.index.shape[-1]
    wide = weight.dtype
    # Rows of keys are each query's own, or all keys for all queries, where the others are masked.
    masked = masking_pays(k.shape[1], chosen)
    own = "bni" if masked else "bcni"

    def of_chunk(carry, piece):
        q, weight, q_nope, q_rope, selected = piece
        if masked:
            valid, rows, keys = mask_of_tokens(selected, k.shape[1]), latent, k
        else:
            valid, rows, keys = selected.valid, _rows(latent, selected.index), _rows(k, selected.index)
        p = _probabilities(q_nope, q_rope, key_up, rows, valid, scale)
        dots = jnp.maximum(jnp.einsum(f"bcji,{own}->bcjn", q, keys, preferred_element_type=wide), 0)
        scores = (dots * weight[..., None]).sum(axis=2)
        loss, d_scores = divergence(p, jnp.where(valid, scores, -jnp.inf))
        total, d_k = carry
        if not differentiate:
            return (total + loss, d_k), None
        d_scores = d_scores[:, :, None]
        d_weight = (dots * d_scores).sum(axis=-1)
        d_dots = jnp.where(dots > 0, d_scores * weight[..., None], 0).astype(q.dtype)
        d_q = jnp.einsum(f"bcjn,{own}->bcji", d_dots, keys, preferred_element_type=wide).astype(q.dtype)
        d_keys = jnp.einsum(f"bcjn,bcji->{own}", d_dots, q, preferred_element_type=wide)
        if masked:
            d_k += d_keys
        else:
            d_k = jax.vmap(lambda d, index, rows: d.at[index].add(rows, mode="clip"))(d_k, selected.index, d_keys)
        return (total + loss, d_k), (d_q, d_weight)

    d_k = jnp.zeros(k.shape if differentiate else (0,), wide)
    own_rows = 0 if masked else latent.shape[-1] + 2 * size
    rows = rows_at_once(query_chunk, batch, (k.shape[1] if masked else chosen) * (own_rows + q_nope.shape[2] + 2 * heads))
    (total, d_k), of_queries = scan_chunks(of_chunk, (jnp.zeros((), wide), d_k), (q, weight, q_nope, q_rope, selected), rows)
    if not differentiate:
        return total, None
    d_q, d_weight = of_queries
    return total, (d_q, d_k.astype(k.dtype), d_weight)


def _probabilities(q_nope, q_rope, key_up, rows, valid, scale):
    """Mean over heads of the softmax over the valid rows of the latent, [B, C, N, K + R] or [B, N, K + R] -> [B, C, N]."""
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    rank = key_up.shape[0]
    absorbed = jnp.einsum("bchd,khd->bchk", q_nope, key_up, preferred_element_type=wide).astype(q_nope.dtype)
    own = "bnk" if rows.ndim == 3 else "bcnk"
    dots = jnp.einsum(f"bchk,{own}->bchn", absorbed, rows[..., :rank], preferred_element_type=wide)
    dots += jnp.einsum(f"bchk,{own}->bchn", q_rope, rows[..., rank:], preferred_element_type=wide)
    logits = jnp.where(valid[:, :, None], dots * scale, -jnp.inf)
    top = logits.max(axis=-1, keepdims=True)
    terms = jnp.exp(logits - jnp.where(top > -jnp.inf, top, 0))
    total = terms.sum(axis=-1, keepdims=True)
    return (terms / jnp.where(total > 0, total, 1)).mean(axis=2)


def _rows(x, index):
    """x [B, T, W], index [B, C, N] -> [B, C, N, W]."""
    return jax.vmap(lambda x, index: x.at[index].get(mode="clip"))(x, index)
