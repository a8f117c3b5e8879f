"""Matrix products of one warpgroup, in 64 rows: wgmma on the device, plain dots in the interpreter, which knows too few of its operands.

Who reads shared memory here must have waited for it to be written.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.launch import MATRIX, layout


def times_transposed(pairs: list[tuple[Any, Any]], interpret: bool) -> jax.Array:
    """The sum of a b^T over pairs a [64, k], b [n, k] in shared memory, float32 in registers."""
    if interpret:
        return sum(_dot(a[...], b[...], 1) for a, b in pairs)  # type: ignore[return-value]

    def run(total):
        for a, b in pairs:
            plgpu.wgmma(total, a, b.transpose((1, 0)))
        return total[...]

    return pl.run_scoped(run, plgpu.ACC((64, pairs[0][1].shape[0]), jnp.float32))


def plus_product(total: jax.Array, a: jax.Array, b: Any, interpret: bool) -> jax.Array:
    """total [64, n] float32 and a [64, k] bfloat16 in registers, b [k, n] in shared memory -> total + a b."""
    if interpret:
        return total + _dot(a, b[...], 0)
    return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(plgpu.ACC.init(total))


def zeros(columns: int, interpret: bool) -> jax.Array:
    return layout(jnp.zeros((64, columns), jnp.float32), MATRIX, interpret)


def column_numbers(columns: int, interpret: bool) -> jax.Array:
    """int32 [64, columns]: each element's column."""
    if interpret:
        return jax.lax.broadcasted_iota(jnp.int32, (64, columns), 1)
    return plgpu.broadcasted_iota(jnp.int32, (64, columns), 1, layout=MATRIX)


def by_row(value: jax.Array, columns: int) -> jax.Array:
    """[64] -> [64, columns]."""
    return jax.lax.broadcast_in_dim(value, (value.shape[0], columns), (0,))


def _dot(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    return jax.lax.dot_general(a, b, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)
