"""Rows times rows, summed by group: one program for 128 by up to 256 numbers of a group's matrix, past which its rows come, 64 at a time.

Tiles of rows begin at multiples of 64 whatever the group, so the first and the last may hold rows of others: these are set to zero where
they arrived, in the left operand.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.launch import WARPGROUP, as_matrix, check_wgmma, kernel
from pallas_kernels.gpu.products import numbers
from pallas_kernels.gpu.warpgroups import USERS, Stream, bring_streams, divide
from pallas_kernels.grouped.gpu.pipeline import DEPTH, ROWS, SLOTS, columns_of, memory, summed

Array = jax.Array


def grouped_outer(x: Array, g: Array, sizes: Array, *, interpret: bool = False) -> Array:
    """[E, I, O]: of each group the sum over its rows of x [R, I] times g [R, O]; zeros for a group without rows."""
    check_wgmma(interpret)
    groups, (height, width) = sizes.shape[0], (x.shape[1], g.shape[1])
    columns = columns_of(width)
    across, blocks = width // columns, height // (USERS * ROWS) * (width // columns)
    inputs = {"x": x, "g": g, "stop": jnp.cumsum(sizes, dtype=jnp.int32)}
    outputs = {"out": jax.ShapeDtypeStruct((groups * height, width), x.dtype)}

    def body(refs, x_s, g_s, out_s, full, empty):
        program = jax.lax.axis_index("block")
        group, block = program // blocks, jax.lax.rem(program, jnp.int32(blocks))
        row, column = block // across * (USERS * ROWS), jax.lax.rem(block, jnp.int32(across)) * columns
        stop = refs["stop"][group]
        start = jnp.where(group > 0, refs["stop"][jnp.maximum(group - 1, 0)], 0)
        first = start // DEPTH
        steps = jnp.where(stop > start, (stop + DEPTH - 1) // DEPTH - first, 0)

        def bringer():
            def fetch(step, slot, barrier):
                rows = pl.ds((first + step) * DEPTH, DEPTH)
                for who in range(USERS):
                    plgpu.copy_gmem_to_smem(refs["x"].at[rows, pl.ds(row + who * ROWS, ROWS)], x_s.at[slot, who], barrier)
                plgpu.copy_gmem_to_smem(refs["g"].at[rows, pl.ds(column, columns)], g_s.at[slot], barrier)

            bring_streams(steps, [Stream(fetch, full, empty)], SLOTS)

        def user():
            who = jax.lax.axis_index(WARPGROUP)

            def operands(step, slot):
                begin, mine = (first + step) * DEPTH, x_s.at[slot, who]

                @pl.when((begin < start) | (begin + DEPTH > stop))
                def _():
                    number = numbers(ROWS, 0, interpret) + begin
                    mine[...] = jnp.where((number >= start) & (number < stop), as_matrix(mine, interpret), 0.0).astype(x.dtype)
                    plgpu.commit_smem()

                return mine, g_s.at[slot]

            total = summed((0, steps), columns, full, empty, operands, (True, False), interpret)
            out_s.at[who][...] = total.astype(x.dtype)
            plgpu.commit_smem()
            rows = pl.ds(group * height + row + who * ROWS, ROWS)
            plgpu.copy_smem_to_gmem(out_s.at[who], refs["out"].at[rows, pl.ds(column, columns)])
            plgpu.wait_smem_to_gmem(0)

        divide(bringer, [user])

    scratch = memory((DEPTH, ROWS), (DEPTH, columns), columns, x.dtype)
    grid = {"block": groups * blocks}
    out = kernel(body, inputs, outputs, grid, interpret=interpret, scratch=scratch, warpgroups=USERS + 1)["out"]
    return out.reshape(groups, height, width)
