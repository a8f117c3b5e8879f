"""What a user calls: one signature for every platform, differentiable, and bad input refused."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.case import Implementation
from pallas_kernels.choose import LANES, Kernels
from pallas_kernels.grouped.choose import choose

Array = jax.Array


def grouped_matmul(x: Array, w: Array, sizes: Array, *, implementation: Implementation | None = None, interpret: bool = False) -> Array:
    """Every row times the matrix of its group, rows lying sorted by group; rows behind the last group give zeros.

    Sums are float32 or wider. The gradients reach `x` and `w`, in their types; a group without rows has none. The kernels work on whole
    tiles: where R is no multiple of 128, rows of zeros are added.

    Args:
      x: [R, I], bfloat16 or float32 (in XLA any float type).
      w: [E, I, O], of x's type.
      sizes: [E] int32, rows of each group; their sum is at most R.
      implementation: "tpu" (Pallas Mosaic TPU), "gpu" (Pallas Mosaic GPU), "xla" (any platform and size), or None for what the platform
        has.
      interpret: runs a kernel step by step on any platform, for tests.

    Returns:
      [R, O] of x's type.

    Raises:
      ValueError: a shape, a type or the platform does not fit; the message says what would.
    """
    if x.ndim != 2 or w.ndim != 3 or sizes.shape != w.shape[:1] or x.shape[1] != w.shape[1]:
        raise ValueError(f"x, w and sizes have shapes {x.shape}, {w.shape} and {sizes.shape}; [R, I], [E, I, O] and [E] are needed")
    if not jnp.issubdtype(x.dtype, jnp.floating) or w.dtype != x.dtype or sizes.dtype != jnp.int32:
        raise ValueError(f"x, w and sizes have types {x.dtype}, {w.dtype} and {sizes.dtype}; one float type twice and int32 are needed")
    kernels, rows = choose(x, w, implementation, interpret), x.shape[0]
    if kernels.name != "xla" and (missing := -rows % LANES):
        return _grouped_matmul(kernels, jnp.pad(x, ((0, missing), (0, 0))), w, sizes)[:rows]
    return _grouped_matmul(kernels, x, w, sizes)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(kernels: Kernels, x: Array, w: Array, sizes: Array) -> Array:
    return kernels.grouped_matmul(x, w, sizes)


def _forward(kernels: Kernels, x: Array, w: Array, sizes: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return kernels.grouped_matmul(x, w, sizes), (x, w, sizes)


def _backward(kernels: Kernels, kept: tuple[Array, Array, Array], g: Array) -> tuple[Any, ...]:
    x, w, sizes = kept
    no_gradient = np.zeros(sizes.shape, jax.dtypes.float0)
    return kernels.grouped_matmul(g, w, sizes, transposed=True), kernels.grouped_outer(x, g, sizes), no_gradient


_grouped_matmul.defvjp(_forward, _backward)
