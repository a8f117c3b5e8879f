"""Matrix products of one warpgroup, in 64 rows: wgmma on the device, plain dots in the interpreter, which knows too few of its operands.

Who reads shared memory here must have waited for it to be written.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.launch import MATRIX, layout


def times_transposed(pairs: list[tuple[Any, Any]], interpret: bool, meanwhile: Callable[[], None] = lambda: None) -> jax.Array:
    """The sum of a b^T over pairs a [64, k], b [n, k] in shared memory, float32 in registers. `meanwhile` runs while it is computed."""
    if interpret:
        found = sum(_dot(a[...], b[...], 1) for a, b in pairs)
        meanwhile()
        return found  # type: ignore[return-value]

    def run(total):
        for a, b in pairs:
            plgpu.wgmma(total, a, b.transpose((1, 0)))
        meanwhile()
        return total[...]

    return pl.run_scoped(run, plgpu.ACC((64, pairs[0][1].shape[0]), jnp.float32))


def plus_products(totals: list[jax.Array], terms: list[list[tuple[jax.Array, Any]]], interpret: bool) -> list[jax.Array]:
    """Each total [64, n] float32 plus the sum of its terms a b, a [64, k] bfloat16 in registers and b [k, n] in shared memory."""
    if interpret:
        return [sum((_dot(a, b[...], 0) for a, b in some), start=total) for total, some in zip(totals, terms)]

    def run(refs):
        for ref, some in zip(refs, terms):
            for a, b in some:
                plgpu.wgmma(ref, a, b)

    return pl.run_state(run)([plgpu.ACC.init(total) for total in totals])


def zeros(columns: int, interpret: bool) -> jax.Array:
    """[64, columns] float32, as products are laid out."""
    return layout(jnp.zeros((64, columns), jnp.float32), MATRIX, interpret)


def numbers(columns: int, axis: int, interpret: bool) -> jax.Array:
    """int32 [64, columns]: each element's row (axis 0) or column (axis 1)."""
    if interpret:
        return jax.lax.broadcasted_iota(jnp.int32, (64, columns), axis)
    return plgpu.broadcasted_iota(jnp.int32, (64, columns), axis, layout=MATRIX)


def spread(value: jax.Array, columns: int, axis: int = 0) -> jax.Array:
    """[64 or columns] -> [64, columns], a value for each row (axis 0) or column (axis 1)."""
    return jax.lax.broadcast_in_dim(value, (64, columns), (axis,))


def _dot(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    return jax.lax.dot_general(a, b, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)
