"""What a user calls: one signature for every platform, differentiable, and bad input refused.

Every function takes `implementation`: "tpu" (Pallas Mosaic TPU), "gpu" (Pallas Mosaic GPU, Hopper), "xla" (any platform and shape), or
None for what the platform has; and `interpret`, which runs a kernel step by step on any platform, for tests.

What is differentiated is the function itself, through all Sinkhorn steps. Kept for the backward pass are the arguments and [K + 1, T]
float32 (see `xla`).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.case import Implementation
from pallas_kernels.mhc.choose import choose
from pallas_kernels.mhc.spec import Mapping, Weights

Array = jax.Array


def mhc_post_pre(
    x: Array,
    y: Array,
    h: Array,
    weights: Weights,
    mapping: Mapping,
    *,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> tuple[Array, Array, Array]:
    """The seam between two sublayers: one's post and the next one's pre (arXiv 2512.24880, Eq. 3, 7-9).

    Args:
      x: streams before the sublayer [T, n*C], bfloat16 or float32; stream i is columns [i*C, (i+1)*C).
      y: the sublayer's output [T, C], of x's type.
      h: its coefficients [K, T] float32, packed as `Mapping` says.
      weights: the next sublayer's mapping, float32.
      mapping: its options.

    Returns:
      The streams between the two [T, n*C] and the next sublayer's input u [T, C], of x's type, and its coefficients [K, T].

    Raises:
      ValueError: a shape, a type or the platform does not fit; the message says what would.
    """
    _check(mapping, x=x, y=y, h=h, weights=weights)
    return _post_pre(mapping, choose(x, mapping, implementation, interpret), x, y, h, weights)


def mhc_pre(
    x: Array,
    weights: Weights,
    mapping: Mapping,
    previous: Array | None = None,
    *,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """A sublayer's input u [T, C] and coefficients [K, T] from the streams x [T, n*C].

    `previous` [K, T] holds the coefficients that read the streams where the mapping reads with the previous sublayer's. Raises as
    `mhc_post_pre`.
    """
    if (previous is None) == (mapping.reads == "previous"):
        raise ValueError('previous coefficients are given if and only if the mapping reads "previous"')
    _check(mapping, x=x, h=previous, weights=weights)
    return _pre(mapping, choose(x, mapping, implementation, interpret), x, weights, previous)


def mhc_post(
    x: Array, y: Array, h: Array, mapping: Mapping, *, implementation: Implementation | None = None, interpret: bool = False
) -> Array:
    """The streams [T, n*C] after a sublayer with output y [T, C] and coefficients h [K, T] (Eq. 3). Raises as `mhc_post_pre`."""
    _check(mapping, x=x, y=y, h=h)
    return _post(mapping, choose(x, mapping, implementation, interpret), x, y, h)


def sinkhorn(
    logits: Array, steps: int = 20, eps: float = 0.0, *, implementation: Implementation | None = None, interpret: bool = False
) -> Array:
    """Logits [n, n, T] float32 -> nearly doubly stochastic matrices (Eq. 9); rows, normalised last, sum to one exactly.

    With `eps`, DeepSeek-V4's form: see `Mapping.sinkhorn_eps`. Raises as `mhc_post_pre`.
    """
    if logits.ndim != 3 or logits.shape[0] != logits.shape[1]:
        raise ValueError(f"logits has shape {logits.shape}; [n, n, T] is needed, tokens last")
    mapping = Mapping(logits.shape[0], sinkhorn_steps=steps, sinkhorn_eps=eps)
    return _sinkhorn(mapping, choose(logits, mapping, implementation, interpret, flat=False), logits)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _post_pre(mapping, kernels, x, y, h, weights):
    return kernels.post_pre(x, y, h, weights, mapping)[:3]


def _post_pre_fwd(mapping, kernels, x, y, h, weights):
    *out, saved = kernels.post_pre(x, y, h, weights, mapping)
    return tuple(out), (x, y, h, weights, saved)


def _post_pre_bwd(mapping, kernels, kept, cotangents):
    x, y, h, weights, saved = kept
    return kernels.post_pre_backward(x, y, h, weights, mapping, saved, *cotangents)


_post_pre.defvjp(_post_pre_fwd, _post_pre_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _pre(mapping, kernels, x, weights, previous):
    return kernels.pre(x, weights, mapping, previous)[:2]


def _pre_fwd(mapping, kernels, x, weights, previous):
    u, h, saved = kernels.pre(x, weights, mapping, previous)
    return (u, h), (x, weights, previous, saved)


def _pre_bwd(mapping, kernels, kept, cotangents):
    x, weights, previous, saved = kept
    dx, d_weights, d_previous = kernels.pre_backward(x, weights, mapping, previous, saved, *cotangents)
    return dx.astype(x.dtype), d_weights, d_previous


_pre.defvjp(_pre_fwd, _pre_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _post(mapping, kernels, x, y, h):
    return kernels.post(x, y, h, mapping)


def _post_fwd(mapping, kernels, x, y, h):
    return kernels.post(x, y, h, mapping), (x, y, h)


def _post_bwd(mapping, kernels, kept, cotangent):
    return kernels.post_backward(*kept, mapping, cotangent)


_post.defvjp(_post_fwd, _post_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sinkhorn(mapping, kernels, logits):
    return kernels.sinkhorn(logits, mapping.sinkhorn_steps, mapping.sinkhorn_eps)


def _sinkhorn_fwd(mapping, kernels, logits):
    return _sinkhorn(mapping, kernels, logits), logits


def _sinkhorn_bwd(mapping, kernels, logits, d):
    return (kernels.sinkhorn_backward(logits, d, mapping.sinkhorn_steps, mapping.sinkhorn_eps),)


_sinkhorn.defvjp(_sinkhorn_fwd, _sinkhorn_bwd)


def _check(mapping: Mapping, x: Array, y: Array | None = None, h: Array | None = None, weights: Weights | None = None) -> None:
    n, rows = mapping.n, mapping.rows
    if x.ndim != 2 or x.shape[1] % n:
        raise ValueError(f"x has shape {x.shape}; flat streams [T, n*C] are needed, the second dimension a multiple of n = {n}")
    tokens, width = x.shape
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x has type {x.dtype}; bfloat16 or float32 is needed")
    wide = jnp.promote_types(x.dtype, jnp.float32)
    wanted: dict[str, tuple[Array | None, tuple[int, ...], Any]] = {"y": (y, (tokens, width // n), x.dtype), "h": (h, (rows, tokens), wide)}
    if weights is not None:
        wanted |= {
            "weights.phi": (weights.phi, (rows, width), wide),
            "weights.alpha": (weights.alpha, (len(mapping.groups),), wide),
            "weights.bias": (weights.bias, (rows,), wide),
        }
    for name, (array, shape, dtype) in wanted.items():
        if array is not None and (array.shape != shape or array.dtype != dtype):
            raise ValueError(
                f"{name} is {array.dtype} {array.shape}; {dtype} {shape} is needed "
                f"for n = {n}, {rows} rows of coefficients and x {x.dtype} {x.shape}"
            )
