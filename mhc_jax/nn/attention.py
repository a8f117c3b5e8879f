"""Causal attention over packed documents, one block of queries at a time.

Scores exist for `query_block` queries only, and for no key after the block's last query, so that no [B, H, S, S] array is ever formed; the
backward pass recomputes them block by block.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mhc_jax.nn.norm import wide


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
    length = q_nope.shape[1]
    outputs, largest = [], []
    for start in range(0, length, query_block):
        stop = min(start + query_block, length)
        rows, keys = slice(start, stop), slice(0, stop)
        block = jax.checkpoint(partial(_attend, start=start, scale=scale))
        out, top = block(
            q_nope[:, rows], q_rope[:, rows], k_nope[:, keys], k_rope[:, keys], value[:, keys], segment_ids[:, rows], segment_ids[:, keys]
        )
        outputs.append(out)
        largest.append(top)
    return jnp.concatenate(outputs, axis=1), jnp.stack(largest).max()


def _attend(q_nope, q_rope, k_nope, k_rope, value, q_segment, k_segment, *, start: int, scale: float):
    """Attention of the queries at positions start, start + 1, ... to the given keys at positions 0, 1, ..."""
    logits = jnp.einsum("bqhd,bkhd->bhqk", q_nope, k_nope) + jnp.einsum("bqhr,bkr->bhqk", q_rope, k_rope)
    logits = wide(logits) * scale
    q_position = start + jnp.arange(q_nope.shape[1])
    seen = (jnp.arange(k_nope.shape[1]) <= q_position[:, None]) & (q_segment[:, :, None] == k_segment[:, None, :])
    logits = jnp.where(seen[:, None], logits, -jnp.inf)
    top = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    weight = jnp.exp(logits - top)
    out = jnp.einsum("bhqk,bkhv->bqhv", weight.astype(value.dtype), value)
    total = weight.sum(axis=-1).transpose(0, 2, 1)[..., None]
    return (out / total).astype(value.dtype), top.max()
