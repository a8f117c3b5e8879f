"""Attention of a few queries to a cache of latents, every visible one: multi-head latent attention in its absorbed form, for decoding.

Queries are multiplied into the latent's space, so that keys and values are the latent itself and none is expanded (arXiv 2405.04434,
section 2.1.2). Equal to the multi-head form of training to rounding. Keys that are normalised head by head are no product of the latent;
for them there is the expanded form. What attends to chosen keys is `pallas_kernels.sparse_attention`.
"""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Float

from mhc_jax.nn.norm import wide_dtype
from pallas_kernels.visible import Span, is_visible

QUERIES = 64  # whose scores exist at a time


def latent_attention(
    q_nope: Float[Array, "B S H D"],
    q_rope: Float[Array, "B S H R"],
    key_up: Float[Array, "K H D"],
    value_up: Float[Array, "K H V"],
    latent: Float[Array, "B T K+R"],
    span: Span,
    *,
    scale: float,
) -> Float[Array, "B S H V"]:
    """Softmax attention over the latents that `span` shows each query; 0 for a query that sees none. No gradient is meant to be taken."""
    rank, dtype = key_up.shape[0], latent.dtype
    product = partial(jnp.einsum, preferred_element_type=wide_dtype(latent))

    def attend(q_nope: Array, q_rope: Array, span: Span) -> Array:
        absorbed = product("bshd,khd->bshk", q_nope, key_up.astype(dtype)).astype(dtype)
        q = jnp.concatenate([absorbed, q_rope], axis=-1)
        weight = _softmax(product("bshe,bte->bsht", q, latent) * scale, span)
        mixed = product("bsht,btk->bshk", weight.astype(dtype), latent[..., :rank])
        return jnp.einsum("bshk,khv->bshv", mixed.astype(dtype), value_up.astype(dtype))

    return _by_blocks(attend, q_nope, q_rope, span)


def expanded_attention(
    q_nope: Float[Array, "B S H D"],
    q_rope: Float[Array, "B S H R"],
    k_nope: Float[Array, "B T H D"],
    k_rope: Float[Array, "B T R"],
    value: Float[Array, "B T H V"],
    span: Span,
    *,
    scale: float,
) -> Float[Array, "B S H V"]:
    """The same over keys and values of every head."""
    product = partial(jnp.einsum, preferred_element_type=wide_dtype(value))

    def attend(q_nope: Array, q_rope: Array, span: Span) -> Array:
        logits = product("bshd,bthd->bsht", q_nope, k_nope) + product("bshr,btr->bsht", q_rope, k_rope)
        return jnp.einsum("bsht,bthv->bshv", _softmax(logits * scale, span).astype(value.dtype), value)

    return _by_blocks(attend, q_nope, q_rope, span)


def _by_blocks(attend: Callable[..., Array], q_nope: Array, q_rope: Array, span: Span) -> Array:
    blocks = [slice(start, start + QUERIES) for start in range(0, q_nope.shape[1], QUERIES)]
    return jnp.concatenate([attend(*(x[:, rows] for x in (q_nope, q_rope)), Span(*(x[:, rows] for x in span))) for rows in blocks], axis=1)


def _softmax(logits: Float[Array, "B S H T"], span: Span) -> Float[Array, "B S H T"]:
    seen = is_visible(span, logits.shape[-1])[:, :, None]
    top = jnp.where(seen, logits, jnp.finfo(logits.dtype).min).max(axis=-1, keepdims=True)
    weight = jnp.where(seen, jnp.exp(logits - top), 0)
    total = weight.sum(axis=-1, keepdims=True)
    return weight / jnp.where(total == 0, 1, total)
