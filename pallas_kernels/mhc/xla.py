"""The seam in plain XLA, forward and backward: for any shape, any float type and any platform.

Written so that XLA has little to move. Coefficients are tokens-last. Streams are mixed by multiply-adds of whole streams, which fuse, and
never by products with n x n matrices, which run token by token. The backward pass is written out: it recomputes the streams between from
what the forward pass was given, and walks the Sinkhorn steps in reverse from their sums (see `gates`).

Saved for it, [K + 1, T] float32: the products z of phi with the streams over their root mean square, and the inverse of that root. They are
100 bytes a token at n = 4; to recompute them would take another pass over the streams.
"""

from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.mhc.spec import Mapping, Weights

Array = jax.Array


def post_pre(x: Array, y: Array, h: Array, weights: Weights, mapping: Mapping) -> tuple[Array, Array, Array, Array]:
    """`reference.mhc_post_pre`, and what the backward pass needs saved."""
    between = post(x, y, h, mapping)
    return between, *pre(between, weights, mapping, h)


def post_pre_backward(
    x: Array, y: Array, h: Array, weights: Weights, mapping: Mapping, saved: Array, d_between: Array, d_u: Array, d_next: Array
) -> tuple[Array, Array, Array, Weights]:
    """Gradients for x, y, h and the weights."""
    between = post(x, y, h, mapping)
    d_read, d_weights, d_previous = pre_backward(between, weights, mapping, h, saved, d_u, d_next)
    dx, dy, dh = post_backward(x, y, h, mapping, _wide(d_between) + d_read)
    return dx, dy, dh if d_previous is None else dh + d_previous, d_weights


def post(x: Array, y: Array, h: Array, mapping: Mapping) -> Array:
    """`reference.mhc_post`."""
    n = mapping.n
    streams, y = _streams(x, n), _wide(y)
    post = _columns(h[n : 2 * n])
    if mapping.mixes:
        streams = [_weighted(_columns(row), streams) for row in _matrix(h, n)]
    return jnp.concatenate([s + w * y for s, w in zip(streams, post)], axis=1).astype(x.dtype)


def post_backward(x: Array, y: Array, h: Array, mapping: Mapping, d_between: Array) -> tuple[Array, Array, Array]:
    """Gradients for x and y, in their types, and for h. `d_between` may be wider than the streams."""
    n = mapping.n
    streams, d_streams, wide_y = _streams(x, n), _streams(d_between, n), _wide(y)
    dy = _weighted(_columns(h[n : 2 * n]), d_streams).astype(y.dtype)
    d_pre, d_post = jnp.zeros_like(h[:n]), [jnp.sum(d * wide_y, axis=1) for d in d_streams]
    if not mapping.mixes:
        return d_between.astype(x.dtype), dy, jnp.concatenate([d_pre, jnp.stack(d_post)])
    res = _matrix(h, n)
    dx = jnp.concatenate([_weighted(_columns(res[:, j]), d_streams) for j in range(n)], axis=1).astype(x.dtype)
    d_res = [jnp.sum(d * s, axis=1) for d in d_streams for s in streams]
    return dx, dy, jnp.concatenate([d_pre, jnp.stack(d_post + d_res)])


def pre(x: Array, weights: Weights, mapping: Mapping, previous: Array | None = None) -> tuple[Array, Array, Array]:
    """`reference.mhc_pre`, and what the backward pass needs saved."""
    wide = _wide(x)
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=1) + mapping.norm_eps)
    z = _project(weights.phi, x) * inverse_rms[None]
    h = gates(_logits(z, weights, mapping), mapping)
    u = _weighted(_columns(_reader(h, mapping, previous)), _streams(x, mapping.n)).astype(x.dtype)
    return u, h, jnp.concatenate([z, inverse_rms[None]])


def pre_backward(
    x: Array, weights: Weights, mapping: Mapping, previous: Array | None, saved: Array, d_u: Array, d_next: Array
) -> tuple[Array, Weights, Array | None]:
    """Gradients for x, float32 or wider, for the weights, and for `previous` where that is what reads."""
    n = mapping.n
    z, inverse_rms = saved[:-1], saved[-1]
    logits = _logits(z, weights, mapping)
    wide_du = _wide(d_u)
    d_reader = jnp.stack([jnp.sum(wide_du * s, axis=1) for s in _streams(x, n)])
    own = mapping.reads == "own"
    d_next = d_next.at[:n].add(d_reader) if own else d_next
    d_logits = gates_backward(logits, d_next, mapping)
    dz = _gate(weights, mapping)[:, None] * d_logits
    g = inverse_rms[None] * dz
    shrink = -jnp.square(inverse_rms) / x.shape[1] * jnp.sum(dz * z, axis=0)
    reader = _columns(_reader(gates(logits, mapping, mixes=False), mapping, previous))
    through_u = jnp.concatenate([w * wide_du for w in reader], axis=1)
    dx = through_u + _unproject(g, weights.phi) + shrink[:, None] * _wide(x)
    splits = np.cumsum(mapping.groups)[:-1]
    d_alpha = jnp.stack([part.sum() for part in jnp.split(d_logits * z, splits)])
    d_weights = Weights(_accumulate(g, x), d_alpha, d_logits.sum(axis=1))
    d_previous = None if own else jnp.zeros_like(d_next).at[:n].set(d_reader)
    return dx, d_weights, d_previous


def gates(logits: Array, mapping: Mapping, mixes: bool = True) -> Array:
    """Logits [K, T] -> h [K, T]; without the rows of res where `mixes` is False."""
    n = mapping.n
    read_and_write = [jax.nn.sigmoid(logits[:n]) + mapping.pre_eps, 2 * jax.nn.sigmoid(logits[n : 2 * n])]
    if not (mapping.mixes and mixes):
        return jnp.concatenate(read_and_write)
    res = sinkhorn(_matrix(logits, n), mapping.sinkhorn_steps, mapping.sinkhorn_eps)
    return jnp.concatenate([*read_and_write, res.reshape(n * n, -1)])


def gates_backward(logits: Array, dh: Array, mapping: Mapping) -> Array:
    """Gradient for the logits from that for h."""
    n = mapping.n
    s = jax.nn.sigmoid(logits[: 2 * n])
    d = s * (1 - s) * dh[: 2 * n] * np.repeat([1.0, 2.0], n).astype(s.dtype)[:, None]
    if not mapping.mixes:
        return d
    d_res = sinkhorn_backward(_matrix(logits, n), _matrix(dh, n), mapping.sinkhorn_steps, mapping.sinkhorn_eps)
    return jnp.concatenate([d, d_res.reshape(n * n, -1)])


def sinkhorn(logits: Array, steps: int, eps: float) -> Array:
    """`reference.sinkhorn` of [n, n, ...]."""
    return jax.lax.scan(lambda m, _: (_normalised(m, eps)[0], None), _first(logits, eps), length=steps - 1)[0]


def sinkhorn_backward(logits: Array, d: Array, steps: int, eps: float) -> Array:
    """Gradient for the logits. Nothing is saved but the sums of each step, and those are recomputed here."""
    m, sums = jax.lax.scan(lambda m, _: _normalised(m, eps), _first(logits, eps), length=steps - 1)

    def back(carry, sums):
        (m, d), (columns, rows) = carry, sums
        m, d = m * rows, (d - jnp.sum(d * m, axis=1, keepdims=True)) / rows
        return (m * columns, (d - jnp.sum(d * m, axis=0, keepdims=True)) / columns), None

    (_, d), _ = jax.lax.scan(back, (m, d), sums, reverse=True)
    return jax.vjp(lambda z: _first(z, eps), logits)[1](d)[0]


def _first(logits: Array, eps: float) -> Array:
    """The first column and row step: on logarithms where eps is 0, so that no sum can vanish."""
    if eps:
        m = jax.nn.softmax(logits, axis=0) + eps
        return m / (m.sum(axis=1, keepdims=True) + eps)
    return jax.nn.softmax(jax.nn.log_softmax(logits, axis=0), axis=1)


def _normalised(m: Array, eps: float) -> tuple[Array, tuple[Array, Array]]:
    """Columns, then rows, to sum one; and the sums that were divided by."""
    columns = m.sum(axis=0, keepdims=True) + eps
    m = m / columns
    rows = m.sum(axis=1, keepdims=True) + eps
    return m / rows, (columns, rows)


def _logits(z: Array, weights: Weights, mapping: Mapping) -> Array:
    return _gate(weights, mapping)[:, None] * z + weights.bias[:, None]


def _gate(weights: Weights, mapping: Mapping) -> Array:
    """alpha of each row, [K]."""
    return jnp.repeat(weights.alpha, np.array(mapping.groups), total_repeat_length=mapping.rows)


def _reader(h: Array, mapping: Mapping, previous: Array | None) -> Array:
    """The weights that read the streams, [n, T]."""
    if mapping.reads == "own":
        return h[: mapping.n]
    assert previous is not None  # api checks it
    return previous[: mapping.n]


def _project(phi: Array, x: Array) -> Array:
    """phi . x of each token [K, T], phi counted as float32. Two bfloat16 terms of it are as exact as bfloat16 streams can tell."""
    if x.dtype != jnp.bfloat16:
        return jnp.einsum("kd,td->kt", phi, x, precision=jax.lax.Precision.HIGHEST)
    terms = jnp.concatenate(_terms(phi))
    return _sum(jnp.split(jnp.einsum("kd,td->kt", terms, x, preferred_element_type=jnp.float32), 2))


def _unproject(g: Array, phi: Array) -> Array:
    """Gradient of `_project` for x, [T, n*C]."""
    return jnp.einsum("kt,kd->td", g, phi, precision=jax.lax.Precision.HIGH)


def _accumulate(g: Array, x: Array) -> Array:
    """Gradient of `_project` for phi, [K, n*C]."""
    if x.dtype != jnp.bfloat16:
        return jnp.einsum("kt,td->kd", g, x, precision=jax.lax.Precision.HIGHEST)
    terms = jnp.concatenate(_terms(g))
    return _sum(jnp.split(jnp.einsum("kt,td->kd", terms, x, preferred_element_type=jnp.float32), 2))


def _terms(a: Array) -> tuple[Array, Array]:
    """float32 as the sum of two bfloat16 terms, to 16 bits of mantissa."""
    high = jax.lax.reduce_precision(a, 8, 7)  # XLA may drop a plain conversion there and back
    return high.astype(jnp.bfloat16), (a - high).astype(jnp.bfloat16)


def _matrix(h: Array, n: int) -> Array:
    return h[2 * n :].reshape(n, n, -1)


def _columns(rows: Array) -> list[Array]:
    """[n, T] -> n columns [T, 1], to weigh whole streams."""
    return list(rows[:, :, None])


def _streams(x: Array, n: int) -> list[Array]:
    return [_wide(s) for s in jnp.split(x, n, axis=1)]


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _weighted(weights: list[Array], streams: list[Array]) -> Array:
    return _sum([w * s for w, s in zip(weights, streams)])


def _sum(parts: list[Array]) -> Array:
    return reduce(jnp.add, parts)
