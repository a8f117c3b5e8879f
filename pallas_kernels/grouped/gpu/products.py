"""Rows times the matrices of their groups: one program for 128 rows and up to 256 columns, past which the depth comes, 64 at a time.

A tile with rows of several groups is multiplied with the matrix of each, one after another, and keeps of each product what is that group's.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.launch import WARPGROUP, as_matrix, check_wgmma, kernel
from pallas_kernels.gpu.products import numbers, zeros
from pallas_kernels.gpu.warpgroups import USERS, Stream, bring_streams, divide
from pallas_kernels.grouped.gpu.pipeline import DEPTH, ROWS, SLOTS, columns_of, memory, summed
from pallas_kernels.grouped.gpu.walk import TILE, walk

Array = jax.Array


def grouped_matmul(x: Array, w: Array, sizes: Array, *, transposed: bool = False, interpret: bool = False) -> Array:
    """[R, I] with [E, I, O], or transposed [R, O] with the same matrices, to [R, O] or [R, I]; rows behind the last group give zeros."""
    check_wgmma(interpret)
    rows, depth = x.shape
    size = w.shape[1] if transposed else w.shape[2]
    columns = columns_of(size)
    blocks, steps = size // columns, depth // DEPTH
    inputs = {"x": x, "w": w.reshape(-1, w.shape[2]), **walk(sizes, rows)._asdict()}
    outputs = {"out": jax.ShapeDtypeStruct((rows, size), x.dtype)}

    def body(refs, x_s, w_s, out_s, full, empty):
        program = jax.lax.axis_index("block")
        tile, column = program // blocks, jax.lax.rem(program, jnp.int32(blocks)) * columns
        first, count = refs["first"][tile], refs["visited"][tile]

        def bringer():
            def fetch(step, slot, barrier):
                deep = jax.lax.rem(step, jnp.int32(steps)) * DEPTH
                for who in range(USERS):
                    own = pl.ds(tile * TILE + who * ROWS, ROWS)
                    plgpu.copy_gmem_to_smem(refs["x"].at[own, pl.ds(deep, DEPTH)], x_s.at[slot, who], barrier)
                matrix = refs["group"][first + step // steps] * w.shape[1]
                part = (matrix + column, columns, deep, DEPTH) if transposed else (matrix + deep, DEPTH, column, columns)
                plgpu.copy_gmem_to_smem(refs["w"].at[pl.ds(*part[:2]), pl.ds(*part[2:])], w_s.at[slot], barrier)

            bring_streams(count * steps, [Stream(fetch, full, empty)], SLOTS)

        def user():
            who = jax.lax.axis_index(WARPGROUP)
            row = numbers(columns, 0, interpret) + (tile * TILE + who * ROWS)
            mine = out_s.at[who]
            mine[...] = zeros(columns, interpret).astype(x.dtype)

            def visit(number, start):
                stop = refs["stop"][first + number]
                steps_of_it = number * steps, steps
                found = summed(
                    steps_of_it, columns, full, empty, lambda _, slot: (x_s.at[slot, who], w_s.at[slot]), (False, transposed), interpret
                )
                kept = jnp.where((row >= start) & (row < stop), found, as_matrix(mine, interpret))
                mine[...] = kept.astype(x.dtype)
                return stop

            start = jnp.where(first > 0, refs["stop"][jnp.maximum(first - 1, 0)], 0)
            jax.lax.fori_loop(0, count, visit, start)
            plgpu.commit_smem()
            own = pl.ds(tile * TILE + who * ROWS, ROWS)
            plgpu.copy_smem_to_gmem(mine, refs["out"].at[own, pl.ds(column, columns)])
            plgpu.wait_smem_to_gmem(0)

        divide(bringer, [user])

    right = (columns, DEPTH) if transposed else (DEPTH, columns)
    scratch = memory((ROWS, DEPTH), right, columns, x.dtype)
    grid = {"block": rows // TILE * blocks}
    return kernel(body, inputs, outputs, grid, interpret=interpret, scratch=scratch, warpgroups=USERS + 1)["out"]
