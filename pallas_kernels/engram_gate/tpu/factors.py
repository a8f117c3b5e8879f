"""Numbers of a token that the backward kernels multiply with, made of what was saved, by XLA: rows [K, T], tokens last.

A kind has a row for every stream. Notation: s the score, alpha the gate, norm the number that RMSNorm(alpha v) is of v.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.engram_gate.spec import DILATION, TAPS
from pallas_kernels.engram_gate.tpu.forward import gate
from pallas_kernels.engram_gate.xla import gate_slope
from pallas_kernels.tpu.tiles import round_up

Array = jax.Array

ALPHA, PRODUCT, SHRINK_H, SHRINK_KEY, D_ALPHA = range(5)  # kinds of both forms
NORM, BY_ALPHA, BY_VALUE, EARLIER = 5, 6, 7, 8  # of the convolution: EARLIER + tap - 1 is norm of the token 3 tap before, if it is seen
KINDS, KINDS_OF_CONV = 5, 8 + TAPS - 1


def gate_factors(scores: Array, d_alpha: Array, width: int) -> list[Array]:
    """The kinds of both forms, [n, T] each; `scores` [3n, T] as saved.

    With d the gradient for alpha: product d is that of <gain h, k>, and shrink d is what h and k have in their own gradients.
    """
    score, inverse_h, inverse_key = jnp.split(scores, 3)
    alpha = gate(score)
    slope = gate_slope(score, alpha)
    shrink = slope * score * (-1 / width)
    product = slope * inverse_h * inverse_key * width**-0.5
    return [alpha, product, shrink * jnp.square(inverse_h), shrink * jnp.square(inverse_key), d_alpha]


def conv_factors(alpha: Array, square: Array, reach: Array, conv_eps: float, width: int) -> tuple[list[Array], list[Array]]:
    """The kinds of the convolution, [n, T] each; and for each tap but the first whether a token sees it, and whether it is seen by it.

    d norm / d alpha; and what, times d norm and v, v has in its own gradient, as norm is made of the mean square of v.
    """
    inverse = jax.lax.rsqrt(jnp.square(alpha) * square[None] + conv_eps)
    norm, cubed = alpha * inverse, inverse * jnp.square(inverse)
    kinds = [norm, conv_eps * cubed, alpha * jnp.square(alpha) * cubed * (-1 / width)]
    sees, seen = [], []
    for tap in range(1, TAPS):
        back = tap * DILATION
        kinds.append(jnp.where((reach >= back)[None], jnp.pad(norm, ((0, 0), (back, 0)))[:, : len(reach)], 0.0))
        sees.append((reach >= back)[None].astype(jnp.float32))
        seen.append((jnp.pad(reach, (0, back))[back:] >= back)[None].astype(jnp.float32))
    return kinds, [*sees, *seen]


def stacked(rows: list[Array]) -> Array:
    """One below the other, with zeros up to a multiple of 8."""
    rows_together = jnp.concatenate(rows)
    return jnp.pad(rows_together, ((0, round_up(len(rows_together), 8) - len(rows_together)), (0, 0)))
