"""Tiles of two matrices that pass by, and the sum of their products in each of two warpgroups. It knows no groups."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.launch import shared
from pallas_kernels.gpu.products import zeros
from pallas_kernels.gpu.warpgroups import USERS, release

Array = jax.Array

ROWS = 64  # of a warpgroup's sum
DEPTH = 64  # of a product, at a step
SLOTS = 3


def columns_of(size: int) -> int:
    """Of a sum: as many as one wgmma takes."""
    return 256 if size % 256 == 0 else 128


def memory(left: tuple[int, int], right: tuple[int, int], columns: int, dtype: Any) -> tuple[Any, ...]:
    """Scratch: the left operands of a step, [USERS, *left], the right one that they share, the results, full, empty."""
    return (
        shared((SLOTS, USERS, *left), dtype),
        shared((SLOTS, *right), dtype),
        shared((USERS, ROWS, columns), dtype),
        plgpu.Barrier(num_arrivals=USERS + 1, num_barriers=SLOTS),
        plgpu.Barrier(num_arrivals=USERS, num_barriers=SLOTS),
    )


def summed(
    steps: tuple[Any, Any], columns: int, full: Any, empty: Any, operands: Callable, turned: tuple[bool, bool], interpret: bool
) -> Array:
    """float32 [64, columns]: the sum of the products of steps[1] steps from step steps[0] on.

    operands(step, slot) gives the left one [64, DEPTH] and the right one [DEPTH, columns], each the other way round where `turned` says so.
    """
    begin, number = steps

    def slot_of(step):
        return jax.lax.rem(step, jnp.int32(SLOTS))

    def arrived(step):
        plgpu.barrier_wait(full.at[slot_of(step)])
        return operands(step, slot_of(step))

    if interpret:

        def one(step, total):
            left, right = arrived(step)
            contracted = ((0 if turned[0] else 1,), (1 if turned[1] else 0,))
            total = total + jax.lax.dot_general(left[...], right[...], (contracted, ((), ())), preferred_element_type=jnp.float32)
            release(empty.at[slot_of(step)], interpret)
            return total

        return jax.lax.fori_loop(begin, begin + number, one, zeros(columns, interpret))

    def run(total):
        def one(step, _):
            plgpu.wgmma(total, *(ref.transpose((1, 0)) if turn else ref for ref, turn in zip(arrived(step), turned)))
            plgpu.wgmma_wait(1)  # what the step before read is free; this step's product goes on
            pl.when(step > begin)(lambda: release(empty.at[slot_of(step - 1)], interpret))
            return ()

        jax.lax.fori_loop(begin, begin + number, one, ())
        plgpu.wgmma_wait(0)
        pl.when(number > 0)(lambda: release(empty.at[slot_of(begin + number - 1)], interpret))
        return total[...]

    return pl.run_scoped(run, plgpu.ACC((ROWS, columns), jnp.float32))
