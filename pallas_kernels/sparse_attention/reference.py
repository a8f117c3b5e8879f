"""The specification: what every implementation computes, in plain jnp, with logits of all keys and a mask. Slow, differentiated by JAX.

Source: arXiv 2512.02556 (multi-query form of latent attention over the selected tokens); the projections are those of arXiv 2405.04434,
section 2.1. Run it with float64 arrays for an oracle.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.sparse_attention.spec import NO_KEYS, SparseAttended, wide_type
from pallas_kernels.visible import PAGE, Selected, Span, is_visible

Array = jax.Array


def sparse_mla(
    q_nope: Array, q_rope: Array, key_up: Array, value_up: Array, latent: Array, selected: Selected, span: Span, scale: float, pages: bool
) -> SparseAttended:
    """As `api.sparse_mla`; [B, H, S, T] is formed."""
    rank = key_up.shape[0]
    wide = wide_type(q_nope)
    content, rotated = latent[..., :rank].astype(wide), latent[..., rank:].astype(wide)
    keys, values = (jnp.einsum("btk,khd->bthd", content, up.astype(wide)) for up in (key_up, value_up))
    dots = jnp.einsum("bshd,bthd->bsht", q_nope.astype(wide), keys) + jnp.einsum("bshr,btr->bsht", q_rope.astype(wide), rotated)
    chosen = mask(selected, span, latent.shape[1], pages)[:, :, None]
    logits = jnp.where(chosen, dots * scale, -jnp.inf)
    some = chosen.any(axis=-1)
    top = jnp.where(some, logits.max(axis=-1), NO_KEYS)
    weight = jnp.where(chosen, jnp.exp(logits - jax.lax.stop_gradient(top)[..., None]), 0.0)
    total = jnp.where(some, weight.sum(axis=-1), 1.0)
    out = jnp.einsum("bsht,bthv->bshv", weight / total[..., None], values)
    log_total = jnp.where(some, top + jnp.log(total), NO_KEYS)
    return SparseAttended(out.astype(q_nope.dtype), jax.lax.stop_gradient(log_total), jax.lax.stop_gradient(top))


def mask(selected: Selected, span: Span, keys: int, pages: bool) -> Array:
    """bool [B, S, T]: which keys each query attends to."""
    choices = -(-keys // PAGE) if pages else keys
    one_hot = (selected.index[..., None] == jnp.arange(choices)[None, None, None]) & selected.valid[..., None]
    chosen = one_hot.any(axis=2)
    if not pages:
        return chosen
    by_token = jnp.repeat(jnp.repeat(chosen, PAGE, axis=1), PAGE, axis=2)[:, : span.first.shape[1], :keys]
    return by_token & is_visible(span, keys)
