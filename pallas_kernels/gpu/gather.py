"""Rows that lie anywhere in global memory, copied into a tile of shared memory as wgmma reads it. No arithmetic on them.

On Hopper TMA copies only rows that stand side by side. So the threads of a warpgroup copy 16 bytes each with cp.async, which Pallas has no
operation for: it is written in Mosaic GPU's own operations, and where a piece goes in the tile is computed here.
"""

from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64  # rows of a tile
PIECE = 8  # elements of bfloat16 in 16 bytes
PASS = 128 // 8  # rows that 128 threads reach at a time: eight threads copy 128 bytes of one


def place(row: Any, column: Any, columns: int) -> Any:
    """Where in a tile [64, columns] of bfloat16 an element lies, counted in elements from the start.

    The tile is 8 x (columns / 64) blocks of eight rows of 128 bytes, in which pieces of 16 bytes are swapped: piece p of row r of a block
    is in place p xor r. Works on integers and arrays alike.
    """
    block = (row // 8) * (columns // 64) + column // 64
    piece = (column % 64 // PIECE) ^ (row % 8)
    return block * 512 + row % 8 * 64 + piece * PIECE + column % PIECE


def start_copy(source: Any, index: Any, tile: Any, interpret: bool) -> None:
    """Starts to copy source[index[r]] to tile[r] for the 64 rows of the tile. Called by one warpgroup.

    Args:
      source: [rows, columns] bfloat16 in global memory; columns are a multiple of 64.
      index: int32 [64] in global memory.
      tile: [64, columns] in shared memory, tiled (8, 64) and swizzled by 128 bytes.
    """
    if interpret:
        numbers = jax.lax.GatherDimensionNumbers(offset_dims=(1,), collapsed_slice_dims=(0,), start_index_map=(0,))
        tile[...] = jax.lax.gather(source[...], index[...][:, None], numbers, (1, source.shape[1]))
        return
    kind = plgpu.RefType((plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))
    plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), kind))(_start)(source, index, tile)


def wait_for_copies(but: int, interpret: bool) -> None:
    """Waits for all copies that this warpgroup started but the last `but`, and makes them visible to wgmma."""
    if not interpret:
        plgpu.inline_mgpu()(lambda _: _wait(but))()
    plgpu.commit_smem()


def _start(_: Any, source: Any, index: Any, tile: Any) -> None:
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, memref, nvvm

    i32, i64, columns = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64), ir.MemRefType(source.type).shape[1]

    def number(value: int, kind: Any = i32) -> Any:
        return arith.constant(kind, ir.IntegerAttr.get(kind, value))

    thread = arith.remui(utils.thread_idx(), number(128))
    row, piece = arith.divui(thread, number(8)), arith.remui(thread, number(8))
    in_block = arith.remui(row, number(8))
    swapped = arith.muli(arith.xori(piece, in_block), number(PIECE))
    # As `place` has it, for the row of the first pass and the first 64 columns.
    there = arith.muli(arith.divui(row, number(8)), number(columns // 64 * 512))
    there = arith.addi(arith.addi(there, arith.muli(in_block, number(64))), swapped)
    element = ir.MemRefType(source.type).element_type
    to = utils.getelementptr(utils.memref_ptr(tile), [there], element)
    begin = utils.memref_ptr(source)
    for first in range(0, ROWS, PASS):
        wanted = memref.load(index, [arith.index_castui(ir.IndexType.get(), arith.addi(row, number(first)))])
        offset = arith.addi(arith.muli(arith.extui(i64, wanted), number(columns, i64)), arith.extui(i64, arith.muli(piece, number(PIECE))))
        here = utils.getelementptr(begin, [offset], element)
        for column in range(0, columns, 64):
            nvvm.cp_async_shared_global(
                utils.getelementptr(to, [place(first, column, columns)], element),
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
