"""The gate in plain XLA, forward and backward: for any shape, any float type and any platform.

Written so that XLA has little to move: streams are handled whole, and everything that is one number a token is a row of [rows, T].
Saved for the backward pass, beside the arguments, [3n, T] float32: scores, then inverse root mean squares of streams and of keys. With the
convolution one row more: the mean square of the value. The backward pass recomputes the convolution.
"""

from functools import reduce

import jax
import jax.numpy as jnp

from pallas_kernels.engram_gate.reference import signed_root
from pallas_kernels.engram_gate.spec import CLAMP, DILATION, TAPS, ShortConv

Array = jax.Array


def gate_add(streams: Array, keys_value: Array, gain: Array, norm_eps: float) -> tuple[Array, Array, Array]:
    """`reference.gate_add`, and what the backward pass needs saved."""
    h, keys, value = _parts(streams, keys_value, len(gain))
    saved = _scores(h, keys, gain, norm_eps)
    alpha = _alpha(saved[: len(h)])
    return _joined([s + a[:, None] * value for s, a in zip(h, alpha)], streams), alpha, saved


def gate_add_backward(
    streams: Array, keys_value: Array, gain: Array, saved: Array, d_out: Array, d_alpha: Array
) -> tuple[Array, Array, Array]:
    """Gradients for streams, keys_value and gain."""
    h, _, value = _parts(streams, keys_value, len(gain))
    d = _split(d_out, len(h))
    alpha = _alpha(saved[: len(h)])
    d_value = _sum([a[:, None] * x for a, x in zip(alpha, d)])
    d_alpha = d_alpha + jnp.stack([jnp.sum(x * value, axis=1) for x in d])
    return _through_scores(streams, keys_value, gain, saved, d, d_alpha, d_value)


def gate_conv_add(
    streams: Array, keys_value: Array, gain: Array, conv: ShortConv, norm_eps: float, conv_eps: float
) -> tuple[Array, Array, Array]:
    """`reference.gate_conv_add`, and what the backward pass needs saved."""
    h, keys, value = _parts(streams, keys_value, len(gain))
    square = jnp.mean(jnp.square(value), axis=1)
    saved = jnp.concatenate([_scores(h, keys, gain, norm_eps), square[None]])
    alpha = _alpha(saved[: len(h)])
    added = _convolved(alpha, value, square, conv.weight, conv.gain, conv.reach, conv_eps)
    return _joined([s + y for s, y in zip(h, added)], streams), alpha, saved


def gate_conv_add_backward(
    streams: Array, keys_value: Array, gain: Array, conv: ShortConv, conv_eps: float, saved: Array, d_out: Array, d_alpha: Array
) -> tuple[Array, Array, Array, Array, Array]:
    """Gradients for streams, keys_value, gain, and the convolution's weight and gain."""
    h, _, value = _parts(streams, keys_value, len(gain))
    d = _split(d_out, len(h))

    def added(alpha: Array, value: Array, square: Array, weight: Array, conv_gain: Array) -> list[Array]:
        return _convolved(alpha, value, square, weight, conv_gain, conv.reach, conv_eps)

    _, pull = jax.vjp(added, _alpha(saved[: len(h)]), value, saved[-1], conv.weight, conv.gain)
    more_alpha, d_value, d_square, d_weight, d_conv_gain = pull(d)
    d_value = d_value + (2 / value.shape[1] * d_square)[:, None] * value
    gradients = _through_scores(streams, keys_value, gain, saved[:-1], d, d_alpha + more_alpha, d_value)
    return *gradients, d_weight, d_conv_gain


def gate_slope(score: Array, alpha: Array) -> Array:
    """The derivative of alpha by the score; zero where the root is clamped."""
    magnitude = jnp.abs(score)
    return jnp.where(magnitude > CLAMP, 0.5 * alpha * (1 - alpha) * jax.lax.rsqrt(jnp.maximum(magnitude, CLAMP)), 0.0)


def _scores(h: list[Array], keys: list[Array], gain: Array, norm_eps: float) -> Array:
    """[3n, T]: scores, inverse root mean squares of streams and of keys."""
    width = gain.shape[1]
    of_h, of_keys = ([jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=1) + norm_eps) for x in xs] for xs in (h, keys))
    dots = [jnp.sum(x * k * g[None], axis=1) for x, k, g in zip(h, keys, gain)]
    scores = [dot * a * b * width**-0.5 for dot, a, b in zip(dots, of_h, of_keys)]
    return jnp.stack([*scores, *of_h, *of_keys])


def _alpha(scores: Array) -> Array:
    return jax.nn.sigmoid(signed_root(scores))


def _convolved(alpha: Array, value: Array, square: Array, weight: Array, gain: Array, reach: Array, eps: float) -> list[Array]:
    """SiLU(Conv(RMSNorm(alpha v))) + alpha v for every stream. The norm of alpha v is a number a token times v."""
    norm = alpha * jax.lax.rsqrt(jnp.square(alpha) * square[None] + eps)
    added = []
    for i, a in enumerate(alpha):
        z = []
        for tap in range(TAPS):
            back = tap * DILATION
            weighted = jnp.where(reach >= back, _earlier(norm[i], back), 0.0)
            z.append((weight[tap, i] * gain[i])[None] * weighted[:, None] * _earlier(value, back))
        added.append(jax.nn.silu(_sum(z)) + a[:, None] * value)
    return added


def _earlier(x: Array, back: int) -> Array:
    """x of `back` tokens before, zero before the first."""
    return jnp.pad(x, ((back, 0), *((0, 0) for _ in x.shape[1:])))[: len(x)]


def _through_scores(
    streams: Array, keys_value: Array, gain: Array, saved: Array, d: list[Array], d_alpha: Array, d_value: Array
) -> tuple[Array, Array, Array]:
    """From gradients for alpha, for the value and through the sum, those for streams, keys_value and gain."""
    h, keys, _ = _parts(streams, keys_value, len(gain))
    scores, of_h, of_keys = jnp.split(saved, 3)
    width = gain.shape[1]
    d_score = d_alpha * gate_slope(scores, _alpha(scores))
    product = d_score * of_h * of_keys * width**-0.5
    shrink_h, shrink_keys = (-d_score * scores * jnp.square(r) / width for r in (of_h, of_keys))
    by_h = [x + p[:, None] * k * g[None] + b[:, None] * s for x, p, k, g, b, s in zip(d, product, keys, gain, shrink_h, h)]
    by_keys = [p[:, None] * s * g[None] + b[:, None] * k for p, s, g, b, k in zip(product, h, gain, shrink_keys, keys)]
    d_gain = jnp.stack([jnp.sum(p[:, None] * s * k, axis=0) for p, s, k in zip(product, h, keys)])
    return _joined(by_h, streams), _joined([*by_keys, d_value], keys_value), d_gain


def _parts(streams: Array, keys_value: Array, n: int) -> tuple[list[Array], list[Array], Array]:
    *keys, value = _split(keys_value, n + 1)
    return _split(streams, n), keys, value


def _split(x: Array, count: int) -> list[Array]:
    return [part.astype(jnp.promote_types(x.dtype, jnp.float32)) for part in jnp.split(x, count, axis=1)]


def _joined(parts: list[Array], like: Array) -> Array:
    return jnp.concatenate(parts, axis=1).astype(like.dtype)


def _sum(parts: list[Array]) -> Array:
    return reduce(jnp.add, parts)
