"""What a user calls: one signature for every platform, differentiable, and bad input refused.

Both functions take `implementation`: "tpu" (Pallas Mosaic TPU), "gpu" (Pallas Mosaic GPU, Hopper), "xla" (any platform and shape), or None
for what the platform has; and `interpret`, which runs a kernel step by step on any platform, for tests. Kept for the backward pass are the
arguments and [3n, T] or [3n + 1, T] float32 (see `xla`).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.case import Implementation
from pallas_kernels.choose import Kernels
from pallas_kernels.engram_gate.choose import choose
from pallas_kernels.engram_gate.spec import TAPS, ShortConv

Array = jax.Array


def gate_add(
    streams: Array,
    keys_value: Array,
    gain: Array,
    *,
    norm_eps: float,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """Adds the value that was looked up to every stream, weighed by how well stream and key agree (arXiv 2601.07372, Eq. 3).

    For every stream i: s = RMSNorm(h_i) . (gain_i * RMSNorm(k_i)) / sqrt(C), alpha_i = sigmoid(copysign(sqrt(max(|s|, 1e-6)), s)), and
    h_i + alpha_i v is returned. All of it is computed in float32; inside the clamp the root has gradient zero.

    Args:
      streams: h [T, n*C], bfloat16 or float32; stream i is columns [i*C, (i+1)*C).
      keys_value: [T, (n+1)*C] of the streams' type: keys of stream 0 to n-1, then the value v.
      gain: [n, C] float32, the product of the gains of query and key.
      norm_eps: added to mean squares, under the root.

    Returns:
      The streams [T, n*C] in their type, and alpha [n, T] float32; both have gradients.

    Raises:
      ValueError: a shape, a type or the platform does not fit; the message says what would.
    """
    _check(streams, keys_value, gain)
    kernels = choose(streams, gain, implementation, interpret, conv=False)
    return _gate_add(norm_eps, kernels, streams, keys_value, gain)


def gate_conv_add(
    streams: Array,
    keys_value: Array,
    gain: Array,
    conv: ShortConv,
    *,
    norm_eps: float,
    conv_eps: float = 1e-5,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """As `gate_add`, but SiLU(Conv(RMSNorm(u_i))) + u_i with u_i = alpha_i v is added to stream i (arXiv 2601.07372, Eq. 5).

    The convolution is causal with taps t, t-3, t-6, t-9, and a tap counts only as far as `conv.reach` lets a token see: tokens of other
    documents and sequences do not mix. `conv_eps` is that of its RMSNorm. On GPU this runs
    in XLA, as `gate_add` does where a token is too large for shared memory.
    """
    _check(streams, keys_value, gain, conv)
    kernels = choose(streams, gain, implementation, interpret, conv=True)
    return _gate_conv_add(norm_eps, conv_eps, kernels, streams, keys_value, gain, conv)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gate_add(norm_eps: float, kernels: Kernels, streams: Array, keys_value: Array, gain: Array) -> tuple[Array, Array]:
    return kernels.gate_add(streams, keys_value, gain, norm_eps)[:2]


def _gate_add_fwd(norm_eps, kernels, streams, keys_value, gain):
    out, alpha, saved = kernels.gate_add(streams, keys_value, gain, norm_eps)
    return (out, alpha), (streams, keys_value, gain, saved)


def _gate_add_bwd(norm_eps, kernels, kept, cotangents):
    return kernels.gate_add_backward(*kept, *cotangents)


_gate_add.defvjp(_gate_add_fwd, _gate_add_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _gate_conv_add(
    norm_eps: float, conv_eps: float, kernels: Kernels, streams: Array, keys_value: Array, gain: Array, conv: ShortConv
) -> tuple[Array, Array]:
    return kernels.gate_conv_add(streams, keys_value, gain, conv, norm_eps, conv_eps)[:2]


def _gate_conv_add_fwd(norm_eps, conv_eps, kernels, streams, keys_value, gain, conv):
    out, alpha, saved = kernels.gate_conv_add(streams, keys_value, gain, conv, norm_eps, conv_eps)
    return (out, alpha), (streams, keys_value, gain, conv, saved)


def _gate_conv_add_bwd(norm_eps, conv_eps, kernels, kept, cotangents):
    streams, keys_value, gain, conv, saved = kept
    *gradients, d_weight, d_gain = kernels.gate_conv_add_backward(streams, keys_value, gain, conv, conv_eps, saved, *cotangents)
    no_gradient: Any = np.zeros(conv.reach.shape, jax.dtypes.float0)
    return *gradients, ShortConv(d_weight, d_gain, no_gradient)


_gate_conv_add.defvjp(_gate_conv_add_fwd, _gate_conv_add_bwd)


def _check(streams: Array, keys_value: Array, gain: Array, conv: ShortConv | None = None) -> None:
    if gain.ndim != 2 or not 1 <= gain.shape[0] <= 8:
        raise ValueError(f"gain has shape {gain.shape}; [n, C] is needed, with n from 1 to 8 streams")
    n, width = gain.shape
    if streams.ndim != 2 or streams.shape[1] != n * width:
        raise ValueError(f"streams have shape {streams.shape}; [T, n*C] is needed, that is [T, {n * width}] for a gain {gain.shape}")
    if not jnp.issubdtype(streams.dtype, jnp.floating):
        raise ValueError(f"streams have type {streams.dtype}; bfloat16 or float32 is needed")
    tokens, wide = streams.shape[0], jnp.promote_types(streams.dtype, jnp.float32)
    wanted: dict[str, tuple[Array, tuple[int, ...], Any]] = {
        "keys_value": (keys_value, (tokens, (n + 1) * width), streams.dtype),
        "gain": (gain, (n, width), wide),
    }
    if conv is not None:
        wanted |= {
            "conv.weight": (conv.weight, (TAPS, n, width), wide),
            "conv.gain": (conv.gain, (n, width), wide),
            "conv.reach": (conv.reach, (tokens,), jnp.dtype(jnp.int32)),
        }
    for name, (array, shape, dtype) in wanted.items():
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(
                f"{name} is {array.dtype} {array.shape}; {dtype} {shape} is needed for n = {n}, C = {width} and "
                f"streams {streams.dtype} {streams.shape}"
            )
