"""Grouped products by XLA's ragged product, for any size and platform.

The gradient of the matrices is XLA's own. TPU compilers of early 2026 compute it for every group over all rows and mask what is not the
group's, which is E times the work.
"""

import jax

Array = jax.Array


def grouped_matmul(x: Array, w: Array, sizes: Array, *, transposed: bool = False) -> Array:
    """[R, I] with [E, I, O], or transposed [R, O] with the same matrices, to [R, O] or [R, I]."""
    return jax.lax.ragged_dot(x, w.swapaxes(1, 2) if transposed else w, sizes)


def grouped_outer(x: Array, g: Array, sizes: Array) -> Array:
    """[E, I, O]: of each group the sum over its rows of x [R, I] times g [R, O]."""
    like = jax.ShapeDtypeStruct((sizes.shape[0], x.shape[1], g.shape[1]), x.dtype)
    return jax.linear_transpose(lambda w: jax.lax.ragged_dot(x, w, sizes), like)(g)[0]
