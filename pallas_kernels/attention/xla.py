"""Dense attention in plain XLA, forward and backward, one block of queries at a time: for any size, any float type and any platform.

Logits exist for `query_block` queries only, and for no key after the block's last query, so that no [B, H, S, S] array is ever formed. The
backward pass computes them again from the saved logarithms of their sums, as FlashAttention does (arXiv 2205.14135).
"""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.spec import Attended

Array = jax.Array


def dense_attention(
    q_nope: Array, q_rope: Array, k_nope: Array, k_rope: Array, value: Array, first: Array, scale: float, query_block: int
) -> Attended:
    """Shapes as in `api.dense_attention`."""
    found = []
    for rows, keys in _blocks(first.shape[1], query_block):
        logits = _logits(q_nope[:, :, rows], q_rope[:, :, rows], k_nope[:, :, keys], k_rope[:, keys], first[:, rows], scale)
        top = logits.max(axis=-1, keepdims=True)
        weight = jnp.exp(logits - top)
        total = weight.sum(axis=-1, keepdims=True)
        out = (jnp.einsum("bhqk,bhkv->bhqv", weight.astype(value.dtype), value[:, :, keys]) / total).astype(value.dtype)
        found.append((out, (top + jnp.log(total))[..., 0], top[..., 0]))
    return Attended(*(jnp.concatenate(parts, axis=2) for parts in zip(*found)))


def dense_attention_backward(
    q_nope: Array,
    q_rope: Array,
    k_nope: Array,
    k_rope: Array,
    value: Array,
    first: Array,
    out: Array,
    log_total: Array,
    d_out: Array,
    scale: float,
    query_block: int,
) -> tuple[Array, Array, Array, Array, Array]:
    """Gradients for q_nope, q_rope, k_nope, k_rope and value, from those of `out`. Sums over blocks of queries are float32 or wider."""
    dtype, wide = value.dtype, log_total.dtype
    product = partial(jnp.einsum, preferred_element_type=wide)
    d_k_nope, d_k_rope, d_value = (jnp.zeros(x.shape, wide) for x in (k_nope, k_rope, value))
    d_q_nope, d_q_rope = [], []
    for rows, keys in _blocks(first.shape[1], query_block):
        q, r, k, d = q_nope[:, :, rows], q_rope[:, :, rows], k_nope[:, :, keys], d_out[:, :, rows]
        logits = _logits(q, r, k, k_rope[:, keys], first[:, rows], scale)
        weight = jnp.exp(logits - log_total[:, :, rows, None])
        d_weight = product("bhqv,bhkv->bhqk", d, value[:, :, keys])
        own = (d.astype(wide) * out[:, :, rows].astype(wide)).sum(axis=-1, keepdims=True)
        d_logits = (weight * (d_weight - own) * scale).astype(dtype)
        d_q_nope.append(jnp.einsum("bhqk,bhkd->bhqd", d_logits, k))
        d_q_rope.append(jnp.einsum("bhqk,bkr->bhqr", d_logits, k_rope[:, keys]))
        d_k_nope = _added(d_k_nope, product("bhqk,bhqd->bhkd", d_logits, q), 2)
        d_k_rope = _added(d_k_rope, product("bhqk,bhqr->bkr", d_logits, r), 1)
        d_value = _added(d_value, product("bhqk,bhqv->bhkv", weight.astype(dtype), d), 2)
    of_queries = jnp.concatenate(d_q_nope, axis=2), jnp.concatenate(d_q_rope, axis=2)
    return *of_queries, d_k_nope.astype(dtype), d_k_rope.astype(dtype), d_value.astype(dtype)


def _added(total: Array, part: Array, axis: int) -> Array:
    """`total` with `part` added at the front of an axis: an update in place, which `.at[].add`, a scatter, is not."""
    front = jax.lax.slice_in_dim(total, 0, part.shape[axis], axis=axis)
    return jax.lax.dynamic_update_slice_in_dim(total, front + part, 0, axis)


def _blocks(length: int, query_block: int) -> Iterator[tuple[slice, slice]]:
    """The queries of every block, and the keys up to its last one."""
    for start in range(0, length, query_block):
        stop = min(start + query_block, length)
        yield slice(start, stop), slice(0, stop)


def _logits(q_nope: Array, q_rope: Array, k_nope: Array, k_rope: Array, first: Array, scale: float) -> Array:
    """[B, H, Q, K] of the last Q of K positions, -inf where a query does not see a key."""
    product = partial(jnp.einsum, preferred_element_type=jnp.promote_types(q_nope.dtype, jnp.float32))
    dots = product("bhqd,bhkd->bhqk", q_nope, k_nope) + product("bhqr,bkr->bhqk", q_rope, k_rope)
    queries, keys = dots.shape[2:]
    key = np.arange(keys, dtype=np.int32)[None]
    earlier = key <= np.arange(keys - queries, keys, dtype=np.int32)[:, None]
    seen = earlier[None] & (key[None] >= first[:, :, None])
    return jnp.where(seen[:, None], dots * scale, -jnp.inf)
