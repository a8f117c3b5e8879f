"""The specification: what every implementation computes, in plain jnp and in the order of the paper. Slow, and differentiated by JAX.

Sources: arXiv 2601.07372, section 2.3, Eq. 3-5; the signed root and its clamp are those of the published code (deepseek-ai/Engram and
DeepSeek-V4.1). Run it with float64 arrays for an oracle; with bfloat16 streams it computes in float32 and rounds once, at the end.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.engram_gate.spec import CLAMP, DILATION, TAPS, ShortConv

Array = jax.Array


def gate_add(streams: Array, keys_value: Array, gain: Array, norm_eps: float) -> tuple[Array, Array]:
    """Streams [T, n*C], keys_value [T, (n+1)*C], gain [n, C] -> streams + alpha v [T, n*C] in their type, and alpha [n, T]."""
    h, alpha, u = _gated(streams, keys_value, gain, norm_eps)
    return _flat(h + u, streams), alpha.T


def gate_conv_add(streams: Array, keys_value: Array, gain: Array, conv: ShortConv, norm_eps: float, conv_eps: float) -> tuple[Array, Array]:
    """As `gate_add`, with SiLU(Conv(RMSNorm(alpha v))) + alpha v added to the streams."""
    h, alpha, u = _gated(streams, keys_value, gain, norm_eps)
    w = _rms_norm(u, conv_eps) * conv.gain[None]
    z = jnp.zeros_like(w)
    for tap in range(TAPS):
        back = tap * DILATION
        earlier = jnp.pad(w, ((back, 0), (0, 0), (0, 0)))[: len(w)]
        z += conv.weight[tap][None] * jnp.where((conv.reach >= back)[:, None, None], earlier, 0.0)
    return _flat(h + jax.nn.silu(z) + u, streams), alpha.T


def _gated(streams: Array, keys_value: Array, gain: Array, norm_eps: float) -> tuple[Array, Array, Array]:
    """h [T, n, C], alpha [T, n], u = alpha v [T, n, C]."""
    n, width = gain.shape
    h = _wide(streams).reshape(-1, n, width)
    keys, value = jnp.split(_wide(keys_value).reshape(-1, n + 1, width), [n], axis=1)
    score = jnp.sum(_rms_norm(h, norm_eps) * gain[None] * _rms_norm(keys, norm_eps), axis=2) / width**0.5
    alpha = jax.nn.sigmoid(signed_root(score))
    return h, alpha, alpha[:, :, None] * value


def signed_root(score: Array) -> Array:
    """copysign(sqrt(max(|s|, 1e-6)), s), with gradient zero where it is clamped."""
    magnitude = jnp.abs(score)
    root = jnp.sqrt(jnp.where(magnitude > CLAMP, magnitude, CLAMP))
    return jnp.where(jnp.signbit(score), -root, root)


def _rms_norm(x: Array, eps: float) -> Array:
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


def _flat(x: Array, like: Array) -> Array:
    return x.reshape(like.shape).astype(like.dtype)


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
