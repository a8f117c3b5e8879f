"""Grouped products on Hopper (Pallas, Mosaic GPU).

walk       which groups have rows in which tile
pipeline   the two warpgroups that multiply what a third brings
products   rows times matrices, and with transposed matrices: forward, and the gradient of rows
outer      rows times rows: the gradient of matrices
"""

import jax
import jax.numpy as jnp

from pallas_kernels.choose import LANES
from pallas_kernels.grouped.gpu.outer import grouped_outer as grouped_outer
from pallas_kernels.grouped.gpu.products import grouped_matmul as grouped_matmul


def misfit(x: jax.Array, w: jax.Array) -> str | None:
    """What about the arrays of `api.grouped_matmul` these kernels cannot take, if anything."""
    if x.dtype != jnp.bfloat16:
        return f"the arrays are {x.dtype}; the GPU kernels take bfloat16"
    if any(size % LANES for size in (*x.shape, *w.shape[1:])):
        return f"R, I and O are {x.shape[0]}, {w.shape[1]} and {w.shape[2]}; the kernels need multiples of {LANES}"
    return None
