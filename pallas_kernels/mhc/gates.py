"""Logits to coefficients and back, token by token: the arithmetic that kernels hold in registers.

A plane is an array that has tokens only; h and its logits are lists of K planes. The backward pass walks the Sinkhorn steps in reverse. A
step y = m / s has the gradient dm = (dy - sum(dy y)) / s, which needs y and s but not m, and m = y s restores what came before: so the
forward pass keeps the 2 n sums of every step, not its n * n entries.
"""

from collections.abc import Callable
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.mhc.spec import Mapping

Planes = list[jax.Array]
Matrix = list[Planes]  # rows of entries
Invert = Callable[[jax.Array], jax.Array]  # 1 / s, as exact as float32


def divide(s: jax.Array) -> jax.Array:
    """1 / s."""
    return 1.0 / s


def gates(logits: Planes, mapping: Mapping, invert: Invert = divide) -> Planes:
    """Logits -> h (arXiv 2512.24880, Eq. 17-19)."""
    n, eps = mapping.n, mapping.sinkhorn_eps
    pre = [_sigmoid(z, invert) + mapping.pre_eps for z in logits[:n]]
    post = [2.0 * _sigmoid(z, invert) for z in logits[n : 2 * n]]
    if not mapping.mixes:
        return pre + post
    m = _first_step(_matrix(logits[2 * n :], n), eps, invert)
    m = jax.lax.fori_loop(0, mapping.sinkhorn_steps - 1, lambda _, m: _step(m, eps, invert)[0], m)
    return pre + post + _flat(m)


def gates_backward(logits: Planes, dh: Planes, mapping: Mapping, sums: Any, invert: Invert = divide) -> Planes:
    """Gradient for the logits from that for h. `sums` is memory for [steps - 1, 2 n] planes, written and read as `sums[t, i]`."""
    n, eps, steps = mapping.n, mapping.sinkhorn_eps, mapping.sinkhorn_steps - 1
    d_pre = [_d_sigmoid(z, d, invert) for z, d in zip(logits[:n], dh[:n])]
    d_post = [2.0 * _d_sigmoid(z, d, invert) for z, d in zip(logits[n : 2 * n], dh[n : 2 * n])]
    if not mapping.mixes:
        return d_pre + d_post
    start = _matrix(logits[2 * n :], n)

    def forward(t, m):
        m, divisors = _step(m, eps, invert)
        for i, s in enumerate(divisors):
            sums[t, i] = s
        return m

    def backward(back, carry):
        t, (m, dm) = steps - 1 - back, carry
        m, dm = _undo_rows(m, dm, [sums[t, n + i] for i in range(n)], invert)
        m, dm = _undo_rows(_transposed(m), _transposed(dm), [sums[t, i] for i in range(n)], invert)
        return _transposed(m), _transposed(dm)

    m = jax.lax.fori_loop(0, steps, forward, _first_step(start, eps, invert))
    m, dm = jax.lax.fori_loop(0, steps, backward, (m, _matrix(dh[2 * n :], n)))
    return d_pre + d_post + _flat(_first_step_backward(start, m, dm, eps, invert))


def _step(m: Matrix, eps: float, invert: Invert) -> tuple[Matrix, Planes]:
    """Columns, then rows, to sum one; and the n + n sums that were divided by."""
    columns, of_columns = _rows(_transposed(m), eps, invert)
    m, of_rows = _rows(_transposed(columns), eps, invert)
    return m, of_columns + of_rows


def _rows(m: Matrix, eps: float, invert: Invert) -> tuple[Matrix, Planes]:
    sums = [_sum(row) + eps if eps else _sum(row) for row in m]
    return [_scaled(row, invert(s)) for row, s in zip(m, sums)], sums


def _undo_rows(y: Matrix, dy: Matrix, sums: Planes, invert: Invert) -> tuple[Matrix, Matrix]:
    """y = m / sums by rows, and the gradient for y -> m and the gradient for m."""
    m, dm = [], []
    for row, d_row, s in zip(y, dy, sums):
        inner = _sum([d * e for d, e in zip(d_row, row)])
        dm.append(_scaled([d - inner for d in d_row], invert(s)))
        m.append(_scaled(row, s))
    return m, dm


def _first_step(logits: Matrix, eps: float, invert: Invert) -> Matrix:
    """The first column and row step. With eps 0 on logarithms, so that no sum can vanish; with eps as DeepSeek-V4's code has it."""
    if eps:
        return _rows(_transposed([[e + eps for e in _softmax(column, invert)] for column in _transposed(logits)]), eps, invert)[0]
    return [_softmax(row, invert) for row in _transposed([_log_softmax(column) for column in _transposed(logits)])]


def _first_step_backward(logits: Matrix, y: Matrix, dy: Matrix, eps: float, invert: Invert) -> Matrix:
    """Gradient for the logits from that for y = `_first_step(logits)`."""
    if eps:
        columns = [_softmax(column, invert) for column in _transposed(logits)]
        sums = [_sum(row) + eps for row in _transposed([[e + eps for e in column] for column in columns])]
        _, d_rows = _undo_rows(y, dy, sums, invert)
        return _transposed([_d_softmax(p, d) for p, d in zip(columns, _transposed(d_rows))])
    d_logs = _transposed([_d_softmax(p, d) for p, d in zip(y, dy)])
    d_columns = []
    for column, d_column in zip(_transposed(logits), d_logs):
        total = _sum(d_column)
        d_columns.append([d - p * total for p, d in zip(_softmax(column, invert), d_column)])
    return _transposed(d_columns)


def _softmax(z: Planes, invert: Invert) -> Planes:
    top = reduce(jnp.maximum, z)
    e = [jnp.exp(x - top) for x in z]
    return _scaled(e, invert(_sum(e)))


def _log_softmax(z: Planes) -> Planes:
    top = reduce(jnp.maximum, z)
    shift = top + jnp.log(_sum([jnp.exp(x - top) for x in z]))
    return [x - shift for x in z]


def _d_softmax(p: Planes, dp: Planes) -> Planes:
    inner = _sum([a * b for a, b in zip(p, dp)])
    return [a * (b - inner) for a, b in zip(p, dp)]


def _sigmoid(z: jax.Array, invert: Invert) -> jax.Array:
    return invert(1.0 + jnp.exp(-z))


def _d_sigmoid(z: jax.Array, d: jax.Array, invert: Invert) -> jax.Array:
    s = _sigmoid(z, invert)
    return d * s * (1.0 - s)


def _matrix(planes: Planes, n: int) -> Matrix:
    return [list(planes[i * n : (i + 1) * n]) for i in range(n)]


def _flat(m: Matrix) -> Planes:
    return [entry for row in m for entry in row]


def _transposed(m: Matrix) -> Matrix:
    return [list(column) for column in zip(*m)]


def _scaled(planes: Planes, factor: jax.Array) -> Planes:
    return [p * factor for p in planes]


def _sum(planes: Planes) -> jax.Array:
    return reduce(jnp.add, planes)
