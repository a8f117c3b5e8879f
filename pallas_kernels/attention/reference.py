"""The specification: causal attention within documents, in plain jnp, with all logits at once. Slow, and differentiated by JAX.

Source: the multi-head form of MLA, DeepSeek-V2 (arXiv 2405.04434, Eq. 17-18), where the rotated key is shared by all heads. Run it with
float64 arrays for an oracle; with bfloat16 ones it computes in float32 and rounds once, at the end.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.attention.spec import Attended
from pallas_kernels.visible import Span, is_visible

Array = jax.Array


def dense_attention(q_nope: Array, q_rope: Array, k_nope: Array, k_rope: Array, value: Array, first: Array, scale: float) -> Attended:
    """Shapes as in `api.dense_attention`."""
    dtype = value.dtype
    q_nope, q_rope, k_nope, k_rope, value = (
        x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (q_nope, q_rope, k_nope, k_rope, value)
    )
    length = first.shape[1]
    stop = jnp.broadcast_to(jnp.arange(1, length + 1, dtype=first.dtype)[None], first.shape)
    dots = jnp.einsum("bhqd,bhkd->bhqk", q_nope, k_nope) + jnp.einsum("bhqr,bkr->bhqk", q_rope, k_rope)
    logits = jnp.where(is_visible(Span(first, stop), length)[:, None], dots * scale, -jnp.inf)
    out = jnp.einsum("bhqk,bhkv->bhqv", jax.nn.softmax(logits, axis=-1), value)
    return Attended(out.astype(dtype), jax.nn.logsumexp(logits, axis=-1), logits.max(axis=-1))
