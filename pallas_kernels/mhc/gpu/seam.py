"""Post, pre and the seam of both, forward and backward: streaming kernels, kernels for gates, and the little that XLA does between them.

Small arrays, rows of [K, T], are XLA's: inverse rms, logits, gradients of alpha and bias.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.mhc.gpu import backward, coefficients, forward
from pallas_kernels.mhc.spec import Mapping, Weights


def post_pre(
    x: jax.Array, y: jax.Array, h: jax.Array, weights: Weights, mapping: Mapping, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Streams x [T, nC], a sublayer's output y [T, C] and its h [K, T] -> streams between, the next u [T, C], the next h, and `saved`.

    `saved` [K+1, T] float32 is for the backward pass: raw products by the inverse rms, and the inverse rms.
    """
    n = mapping.n
    early = h[:n] if mapping.reads == "previous" else None
    out = forward.stream(x, y, n, **_mixing(h, mapping), pre=early, phi=weights.phi, interpret=interpret)
    h_next, saved = _predicted(out["sums"], x.shape[1], weights, mapping, interpret)
    if early is None:
        out |= forward.stream(out["between"], None, n, pre=h_next[:n], interpret=interpret)
    return out["between"], out["u"], h_next, saved


def pre(
    x: jax.Array, weights: Weights, mapping: Mapping, previous: jax.Array | None = None, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Streams [T, nC] -> the sublayer's input u [T, C], h [K, T], and `saved` as `post_pre` has it."""
    n = mapping.n
    early = _pre_of(previous, n) if mapping.reads == "previous" else None
    out = forward.stream(x, None, n, pre=early, phi=weights.phi, interpret=interpret)
    h, saved = _predicted(out["sums"], x.shape[1], weights, mapping, interpret)
    if early is None:
        out |= forward.stream(x, None, n, pre=h[:n], interpret=interpret)
    return out["u"], h, saved


def post(x: jax.Array, y: jax.Array, h: jax.Array, mapping: Mapping, *, interpret: bool = False) -> jax.Array:
    """Streams x [T, nC], a sublayer's output y [T, C] and its h [K, T] -> the streams after it (arXiv 2512.24880, Eq. 3)."""
    return forward.stream(x, y, mapping.n, **_mixing(h, mapping), interpret=interpret)["between"]


def post_pre_backward(
    x: jax.Array,
    y: jax.Array,
    h: jax.Array,
    weights: Weights,
    mapping: Mapping,
    saved: jax.Array,
    d_between: jax.Array,
    d_u: jax.Array,
    d_h_next: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, Weights]:
    """Gradients for x, y, h and the weights."""
    n = mapping.n
    dots = forward.dots(x, y, d_u, n, interpret=interpret)
    d_pre = dots[:n] if not mapping.mixes else jnp.einsum("ijt,jt->it", h[2 * n :].reshape(n, n, -1), dots[:n], precision="highest")
    d_pre = d_pre + h[n : 2 * n] * dots[n:]
    reader, d_reader, dl = _through_gates(weights, mapping, saved, d_h_next, d_pre, h, interpret)
    g, shrink, d_alpha, d_bias = _through_norm(dl, saved, weights, mapping, x.shape[1])
    out = backward.stream(
        x, y, d_between, d_u, n, **_mixing(h, mapping), pre=reader, phi=weights.phi, g=g, shrink=shrink, interpret=interpret
    )
    return out["x"], out["y"], jnp.concatenate([d_reader, out["gates"]]), Weights(out["phi"], d_alpha, d_bias)


def pre_backward(
    x: jax.Array,
    weights: Weights,
    mapping: Mapping,
    previous: jax.Array | None,
    saved: jax.Array,
    d_u: jax.Array,
    d_h: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, Weights, jax.Array | None]:
    """Gradients for x, the weights, and `previous` where it reads, else None."""
    n = mapping.n
    d_pre = forward.dots(x, None, d_u, n, interpret=interpret)
    reader, d_reader, dl = _through_gates(weights, mapping, saved, d_h, d_pre, previous, interpret)
    g, shrink, d_alpha, d_bias = _through_norm(dl, saved, weights, mapping, x.shape[1])
    out = backward.stream(x, None, None, d_u, n, pre=reader, phi=weights.phi, g=g, shrink=shrink, interpret=interpret)
    d_previous = jnp.pad(d_reader, ((0, mapping.rows - n), (0, 0))) if mapping.reads == "previous" else None
    return out["x"], Weights(out["phi"], d_alpha, d_bias), d_previous


def post_backward(
    x: jax.Array, y: jax.Array, h: jax.Array, mapping: Mapping, d_between: jax.Array, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients for x, y and h, whose pre rows have none."""
    out = backward.stream(x, y, d_between, None, mapping.n, **_mixing(h, mapping), interpret=interpret)
    return out["x"], out["y"], jnp.pad(out["gates"], ((mapping.n, 0), (0, 0)))


def _mixing(h: jax.Array, mapping: Mapping) -> dict[str, jax.Array | None]:
    n = mapping.n
    return {"post": h[n : 2 * n], "res": h[2 * n :] if mapping.mixes else None}


def _pre_of(previous: jax.Array | None, n: int) -> jax.Array:
    if previous is None:
        raise ValueError('mapping.reads is "previous", and previous, the h that reads, is None')
    return previous[:n]


def _predicted(sums: jax.Array, width: int, weights: Weights, mapping: Mapping, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """Raw products and sums of squares [K+1, T] -> h [K, T] and `saved`."""
    inverse_rms = jax.lax.rsqrt(sums[-1:] / width + mapping.norm_eps)
    saved = jnp.concatenate([sums[:-1] * inverse_rms, inverse_rms])
    return coefficients.forward(_logits(saved, weights, mapping), mapping, interpret=interpret), saved


def _logits(saved: jax.Array, weights: Weights, mapping: Mapping) -> jax.Array:
    return _by_row(weights.alpha, mapping) * saved[:-1] + weights.bias[:, None]


def _by_row(alpha: jax.Array, mapping: Mapping) -> jax.Array:
    """[groups] -> [K, 1]."""
    return jnp.repeat(alpha, np.array(mapping.groups), total_repeat_length=mapping.rows)[:, None]


def _through_gates(
    weights: Weights, mapping: Mapping, saved: jax.Array, dh: jax.Array, d_pre: jax.Array, previous: jax.Array | None, interpret: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The pre [n, T] that read; the gradient for the pre rows of the h that came in; the gradient for the logits [K, T]."""
    n = mapping.n
    logits = _logits(saved, weights, mapping)
    if mapping.reads == "previous":
        return _pre_of(previous, n), d_pre, coefficients.backward(logits, dh, mapping, interpret=interpret)
    reader = jax.nn.sigmoid(logits[:n]) + mapping.pre_eps
    return reader, jnp.zeros_like(d_pre), coefficients.backward(logits, dh.at[:n].add(d_pre), mapping, interpret=interpret)


def _through_norm(
    dl: jax.Array, saved: jax.Array, weights: Weights, mapping: Mapping, width: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradient for the logits -> g [K, T] and shrink [1, T], by which X' gets phi^T g + shrink X'; gradients for alpha and bias."""
    z, inverse_rms = saved[:-1], saved[-1:]
    dz = _by_row(weights.alpha, mapping) * dl
    shrink = -jnp.square(inverse_rms) / width * jnp.sum(dz * z, axis=0, keepdims=True)
    ends = np.cumsum(mapping.groups)
    by_row = jnp.sum(dl * z, axis=1)
    d_alpha = jnp.stack([by_row[end - size : end].sum() for end, size in zip(ends, mapping.groups)])
    return inverse_rms * dz, shrink, d_alpha, dl.sum(axis=1)
