"""Rows that lie anywhere in global memory, copied into a tile of shared memory as wgmma reads it. No arithmetic on them.

On Hopper TMA copies only rows that stand side by side. So the threads of a warpgroup copy 16 bytes each with cp.async, which Pallas has no
operation for: it is written in Mosaic GPU's own operations, and where a piece goes in the tile is computed here.
"""

from functools import partial
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

PIECE = 8  # elements of bfloat16 in 16 bytes
PASS = 128 // 8  # rows that 128 threads reach at a time: eight threads copy 128 bytes of one


def place(row: Any, column: Any, columns: int, swizzle: int = 128) -> Any:
    """Where in a tile [n, columns] of bfloat16 an element lies, counted in elements from the start.

    The tile consists of blocks of eight rows of `swizzle` bytes. A block's pieces of 16 bytes are permuted: a piece's number within its row
    is combined, by exclusive or, with the number of the 128 bytes that it stands in. Works on integers and arrays alike.
    """
    width = swizzle // 2
    block = (row // 8) * (columns // width) + column // width
    piece = (column % width // PIECE) ^ (row % 8 * swizzle // 128)
    return block * 8 * width + row % 8 * width + piece * PIECE + column % PIECE


def start_copy(source: Any, index: Any, tile: Any, interpret: bool, swizzle: int = 128) -> None:
    """Starts to copy source[index[r]] to tile[r] for all rows of the tile. Called by one warpgroup.

    Args:
      source: [rows, columns] bfloat16 in global memory; columns are a multiple of 64.
      index: int32 [n] in global memory, n a multiple of 16.
      tile: [n, columns] in shared memory, as `launch.shared` makes it with this swizzle.
    """
    if interpret:
        numbers = jax.lax.GatherDimensionNumbers(offset_dims=(1,), collapsed_slice_dims=(0,), start_index_map=(0,))
        tile[...] = jax.lax.gather(source[...], index[...][:, None], numbers, (1, source.shape[1]))
        return
    kind = plgpu.RefType((plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle)))
    plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), kind))(partial(_start, swizzle))(source, index, tile)


def wait_for_copies(but: int, interpret: bool) -> None:
    """Waits for all copies that this warpgroup started but the last `but`, and makes them visible to wgmma."""
    if not interpret:
        plgpu.inline_mgpu()(lambda _: _wait(but))()
    plgpu.commit_smem()


def _start(swizzle: int, _: Any, source: Any, index: Any, tile: Any) -> None:
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, memref, nvvm

    i32, i64, columns = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64), ir.MemRefType(source.type).shape[1]

    def number(value: int, kind: Any = i32) -> Any:
        return utils.c(value, kind)

    def times(value: Any, by: int) -> Any:
        return arith.muli(value, number(by))

    def divided(value: Any, by: int) -> tuple[Any, Any]:
        return arith.divui(value, number(by)), arith.remui(value, number(by))

    # Eight threads copy 128 bytes of a row. `place` of this thread's first piece, term by term:
    width = swizzle // 2
    row, piece = divided(arith.remui(utils.thread_idx(), number(128)), 8)
    block_row, in_block = divided(row, 8)
    block_column, in_row = divided(piece, width // PIECE)
    swapped = arith.xori(in_row, arith.divui(times(in_block, swizzle), number(128)))
    block = arith.addi(times(block_row, columns // width), block_column)
    there = arith.addi(times(block, 8 * width), arith.addi(times(in_block, width), times(swapped, PIECE)))
    element = ir.MemRefType(source.type).element_type
    to = utils.getelementptr(utils.memref_ptr(tile), [there], element)
    begin = utils.memref_ptr(source)
    for first in range(0, ir.MemRefType(index.type).shape[0], PASS):
        wanted = memref.load(index, [arith.index_castui(ir.IndexType.get(), arith.addi(row, number(first)))])
        offset = arith.addi(arith.muli(arith.extui(i64, wanted), number(columns, i64)), arith.extui(i64, times(piece, PIECE)))
        here = utils.getelementptr(begin, [offset], element)
        for column in range(0, columns, 64):
            nvvm.cp_async_shared_global(
                utils.getelementptr(to, [place(first, column, columns, swizzle)], element),
                _in_global_memory(utils.getelementptr(here, [column], element)),
                16,
                nvvm.LoadCacheModifierKind.CG,
            )
    nvvm.cp_async_commit_group()


def _in_global_memory(pointer: Any) -> Any:
    from jaxlib.mlir.dialects import llvm

    return llvm.addrspacecast(llvm.PointerType.get(address_space=1), pointer)


def _wait(but: int) -> None:
    from jaxlib.mlir.dialects import nvvm

    nvvm.cp_async_wait_group(but)
