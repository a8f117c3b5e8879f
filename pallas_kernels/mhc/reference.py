"""The specification: what every implementation computes, in plain jnp and in the order of the paper. Slow, and differentiated by JAX.

Source: arXiv 2512.24880, Eq. 3, 7-9 and 14-19. Run it with float64 arrays for an oracle; with bfloat16 streams it computes in float32 and
rounds where the kernels round: x' and u when they are written.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.mhc.spec import Mapping, Weights


def sinkhorn(logits: jax.Array, steps: int = 20, eps: float = 0.0) -> jax.Array:
    """Logits [n, n, ...] -> nearly doubly stochastic matrices: `steps` times columns, then rows, to sum one.

    Rows, normalised last, are exact. With eps 0 the first step is taken on logarithms, so that no logits can make a sum vanish. With eps,
    as in DeepSeek-V4's code: softmax over the columns, plus eps, and eps added to every sum that follows.
    """
    if eps:
        m = jax.nn.softmax(logits, axis=0) + eps
        m = m / (m.sum(axis=1, keepdims=True) + eps)
    else:
        m = jax.nn.softmax(jax.nn.log_softmax(logits, axis=0), axis=1)
    for _ in range(steps - 1):
        m = m / (m.sum(axis=0, keepdims=True) + eps)
        m = m / (m.sum(axis=1, keepdims=True) + eps)
    return m


def coefficients(x: jax.Array, weights: Weights, mapping: Mapping) -> jax.Array:
    """Streams [T, n*C] -> h [K, T], float32 or wider."""
    n = mapping.n
    x = _wide(x)
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1) + mapping.norm_eps)
    raw = jnp.einsum("kd,td->kt", weights.phi, x, precision=jax.lax.Precision.HIGHEST)
    gate = jnp.repeat(weights.alpha, np.array(mapping.groups), total_repeat_length=mapping.rows)
    logits = gate[:, None] * (raw * inverse_rms[None]) + weights.bias[:, None]
    pre = jax.nn.sigmoid(logits[:n]) + mapping.pre_eps
    post = 2 * jax.nn.sigmoid(logits[n : 2 * n])
    if not mapping.mixes:
        return jnp.concatenate([pre, post])
    res = sinkhorn(logits[2 * n :].reshape(n, n, -1), mapping.sinkhorn_steps, mapping.sinkhorn_eps)
    return jnp.concatenate([pre, post, res.reshape(n * n, -1)])


def mhc_pre(x: jax.Array, weights: Weights, mapping: Mapping, previous: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Streams [T, n*C] -> the sublayer's input u [T, C] in x's type, and h [K, T]. `previous` is the h that reads where mapping says so."""
    h = coefficients(x, weights, mapping)
    reader = h if previous is None or mapping.reads == "own" else previous
    pre = reader[: mapping.n]
    u = jnp.einsum("it,tic->tc", pre, _streams(x, mapping.n), precision=jax.lax.Precision.HIGHEST)
    return u.astype(x.dtype), h


def mhc_post(x: jax.Array, y: jax.Array, h: jax.Array, mapping: Mapping) -> jax.Array:
    """Streams [T, n*C], a sublayer's output y [T, C] and its h [K, T] -> the streams after it [T, n*C], in x's type (Eq. 3)."""
    n = mapping.n
    streams, y = _streams(x, n), _wide(y)
    if mapping.mixes:
        res = h[2 * n :].reshape(n, n, -1)
        streams = jnp.einsum("ijt,tjc->tic", res, streams, precision=jax.lax.Precision.HIGHEST)
    return (streams + h[n : 2 * n].T[:, :, None] * y[:, None, :]).reshape(x.shape).astype(x.dtype)


def mhc_post_pre(x: jax.Array, y: jax.Array, h: jax.Array, weights: Weights, mapping: Mapping) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The seam: one sublayer's post and the next one's pre. Returns the streams between them, the next input u and the next h."""
    between = mhc_post(x, y, h, mapping)
    return between, *mhc_pre(between, weights, mapping, h)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _streams(x: jax.Array, n: int) -> jax.Array:
    return _wide(x).reshape(x.shape[0], n, -1)
