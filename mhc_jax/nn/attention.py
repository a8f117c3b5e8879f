"""Causal attention over packed documents, one block of queries at a time.

Scores exist for `query_block` queries only, and for no key after the block's last query, so that no [B, H, S, S] array is ever formed. The
backward pass computes them again from the saved log-sum-exp, as FlashAttention does (arXiv 2205.14135).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mhc_jax.nn.norm import wide, wide_dtype


def causal_attention(
    q_nope: Float[Array, "B S H D"],
    q_rope: Float[Array, "B S H R"],
    k_nope: Float[Array, "B S H D"],
    k_rope: Float[Array, "B S R"],
    value: Float[Array, "B S H V"],
    segment_ids: Int[Array, "B S"],
    *,
    scale: float,
    query_block: int,
) -> tuple[Float[Array, "B S H V"], Float[Array, ""]]:
    """Softmax attention to earlier positions of the same segment; the rotated key is shared by all heads.

    Logits are (q_nope . k_nope + q_rope . k_rope) * scale, in float32 or wider. Every position sees itself, so no row is empty.

    Returns:
      The attended values, and the largest logit that any query saw (no gradient).
    """
    q_nope, q_rope, k_nope, value = (x.swapaxes(1, 2) for x in (q_nope, q_rope, k_nope, value))  # heads before positions
    length = q_nope.shape[2]
    outputs, largest = [], []
    for start in range(0, length, query_block):
        stop = min(start + query_block, length)
        rows, keys = slice(start, stop), slice(0, stop)
        hidden = _hidden(segment_ids[:, rows], segment_ids[:, keys], start)
        out, top = _attend(q_nope[:, :, rows], q_rope[:, :, rows], k_nope[:, :, keys], k_rope[:, keys], value[:, :, keys], hidden, scale)
        outputs.append(out)
        largest.append(top)
    return jnp.concatenate(outputs, axis=2).swapaxes(1, 2), jnp.stack(largest).max()


def _hidden(q_segment: Int[Array, "B Q"], k_segment: Int[Array, "B K"], start: int) -> Float[Array, "B Q K"]:
    """0 where the query at position start + q sees key k, -inf where it does not."""
    earlier = np.arange(k_segment.shape[1]) <= start + np.arange(q_segment.shape[1])[:, None]
    return jnp.where(earlier[None] & (q_segment[:, :, None] == k_segment[:, None, :]), 0.0, -jnp.inf)


def _logits(q_nope, q_rope, k_nope, k_rope, hidden, scale):
    wide_type = wide_dtype(q_nope)
    product = partial(jnp.einsum, preferred_element_type=wide_type)
    dots = product("bhqd,bhkd->bhqk", q_nope, k_nope) + product("bhqr,bkr->bhqk", q_rope, k_rope)
    return dots * scale + hidden[:, None].astype(wide_type)


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q_nope, q_rope, k_nope, k_rope, value, hidden, scale):
    """[B H Q D], [B H Q R], [B H K D], [B K R], [B H K V], [B Q K] -> output [B H Q V] and the largest logit."""
    return _attend_fwd(q_nope, q_rope, k_nope, k_rope, value, hidden, scale)[0]


def _attend_fwd(q_nope, q_rope, k_nope, k_rope, value, hidden, scale):
    logits = _logits(q_nope, q_rope, k_nope, k_rope, hidden, scale)
    top = logits.max(axis=-1, keepdims=True)
    weight = jnp.exp(logits - top)
    total = weight.sum(axis=-1, keepdims=True)
    out = (jnp.einsum("bhqk,bhkv->bhqv", weight.astype(value.dtype), value) / total).astype(value.dtype)
    log_total = top + jnp.log(total)
    return (out, top.max()), (q_nope, q_rope, k_nope, k_rope, value, hidden, out, log_total)


def _attend_bwd(scale, saved, cotangents):
    q_nope, q_rope, k_nope, k_rope, value, hidden, out, log_total = saved
    d_out, _ = cotangents  # the largest logit has no gradient
    dtype = value.dtype
    weight = jnp.exp(_logits(q_nope, q_rope, k_nope, k_rope, hidden, scale) - log_total)
    d_value = jnp.einsum("bhqk,bhqv->bhkv", weight.astype(dtype), d_out)
    d_weight = jnp.einsum("bhqv,bhkv->bhqk", d_out, value, preferred_element_type=weight.dtype)
    own = (wide(d_out) * wide(out)).sum(axis=-1, keepdims=True)
    d_logits = (weight * (d_weight - own) * scale).astype(dtype)
    return (
        jnp.einsum("bhqk,bhkd->bhqd", d_logits, k_nope),
        jnp.einsum("bhqk,bkr->bhqr", d_logits, k_rope),
        jnp.einsum("bhqk,bhqd->bhkd", d_logits, q_nope),
        jnp.einsum("bhqk,bhqr->bkr", d_logits, q_rope),
        d_value,
        jnp.zeros_like(hidden),
    )


_attend.defvjp(_attend_fwd, _attend_bwd)
