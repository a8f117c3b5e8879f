"""How every GPU kernel here is started, and the pipeline that feeds it. No arithmetic of hyper-connections lives here.

`plgpu.emit_pipeline` would do the same, but stores under a predicate, which the interpreter for CPU does not know.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.choose import HOPPER
from pallas_kernels.choose import SHARED_MEMORY as SHARED_MEMORY

TOKENS = 64  # tokens in a tile: the rows of a wgmma
MATRIX = plgpu.Layout.WGMMA
COLUMN = plgpu.Layout.WGMMA.reduce(1)  # one value for each row of a MATRIX
ROW = plgpu.Layout.WGMMA.reduce(0)  # one value for each column of a MATRIX
WARPGROUP = "warpgroup"
MULTIPROCESSORS = 132  # of an H100 or H200; only the number of programs that a grid is cut into depends on it


class Tile(NamedTuple):
    """A two-dimensional block of `ref` in global memory for each step: `shape` elements from row and column `start(step)`.

    `swizzle` as `shared` has it, or 0 for plain rows.
    """

    ref: Any
    shape: tuple[int, int]
    start: Callable[[jax.Array], tuple[jax.Array | int, jax.Array | int]]
    swizzle: int = 128

    def at(self, step: jax.Array):
        return self.ref.at[tuple(pl.ds(start, size) for start, size in zip(self.start(step), self.shape))]


Tiles = dict[str, list[Tile]]


def kernel(
    body: Callable,
    inputs: dict[str, jax.Array],
    outputs: dict[str, Any],
    grid: dict[str, int],
    *,
    interpret: bool,
    scratch: tuple = (),
    warpgroups: int = 1,
    approximate: bool = False,
) -> dict[str, jax.Array]:
    """Runs `body(refs, *scratch)` on a grid with named axes; refs, inputs and outputs go by name. With `interpret` on the CPU.

    Programs of several warpgroups share the scratch; each runs the body, and `jax.lax.axis_index(WARPGROUP)` tells them apart. With
    `approximate`, exp2 and log are the device's instructions (errors of 2^-22) and nothing for the sake of denormal numbers is added.
    """

    def named(*refs):
        names = [*inputs, *outputs]
        body(dict(zip(names, refs)), *refs[len(names) :])

    threads: dict[str, Any] = {"num_threads": warpgroups, "thread_name": WARPGROUP} if warpgroups > 1 else {}
    call = plgpu.kernel(
        named,
        out_type=list(outputs.values()),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        scratch_types=list(scratch),
        **threads,
        interpret=_interpreter() if interpret else False,
        # The other lowering, Warpgroup, finds layouts by itself; with some hundreds of operations that takes twenty times longer.
        compiler_params=plgpu.CompilerParams(approx_math=approximate, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    return dict(zip(outputs, call(*inputs.values())))


def _interpreter() -> Any:
    if hasattr(plgpu, "InterpretGPUParams"):
        return plgpu.InterpretGPUParams()
    from jax._src.pallas.mosaic_gpu.interpret import params  # jax 0.10 has it, not yet under a public name

    return params.InterpretGPUParams()


def check_wgmma(interpret: bool) -> None:
    """ValueError where the device that is compiled for is not Hopper, the one generation with wgmma."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None) or jax.devices()[0]
    if not interpret and not any(name in device.device_kind for name in HOPPER):
        raise ValueError(
            f"the GPU kernels that project multiply with wgmma, which {', '.join(HOPPER)} have and {device.device_kind} has not; "
            f'implementation "xla" runs on any GPU'
        )


def layout(x: jax.Array, wanted: Any, interpret: bool) -> jax.Array:
    """x in the register layout `wanted`; layouts mean nothing to the interpreter."""
    return x if interpret else plgpu.layout_cast(x, wanted)


def as_matrix(buffer: Any, interpret: bool) -> jax.Array:
    """What is in a buffer [64, columns], as float32 in registers."""
    return layout(buffer[...], MATRIX, interpret).astype(jnp.float32)


def shared(shape: tuple[int, ...], dtype: Any, swizzle: int = 128) -> Any:
    """Shared memory for matrices as wgmma reads them: tiles of eight rows of up to `swizzle` bytes. A leading axis counts slots.

    Both operands of a wgmma need rows of the same bytes.
    """
    size = jnp.dtype(dtype).itemsize
    row = next(bytes for bytes in (128, 64, 32) if bytes <= swizzle and shape[-1] * size % bytes == 0)
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, row // size)), plgpu.SwizzleTransform(row)))


def pipeline(body: Callable, steps: int, loads: Tiles, stores: Tiles, stages: int, *, slots: int = 2, carry: Any = ()) -> Any:
    """Runs carry = body(step, loaded, stored, carry), where copies of `stages` steps and stores of `slots` steps are under way.

    `loaded` are buffers by the names of `loads`; `stored()` waits until those for the outputs are free and returns them. Returns the last
    carry, when all is written.
    """
    stages, slots = min(stages, steps), min(slots, steps)

    def scoped(loaded, stored, arrived):
        def fetch(step, slot):
            for tile, buffer in _pairs(loads, loaded):
                plgpu.copy_gmem_to_smem(tile.at(step), buffer.at[slot], arrived.at[slot])

        for step in range(stages):
            fetch(jnp.int32(step), step)

        def advance(step, carry):
            slot, out = jax.lax.rem(step, jnp.int32(stages)), jax.lax.rem(step, jnp.int32(slots))

            def free():
                plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
                return _at(stored, out)

            plgpu.barrier_wait(arrived.at[slot])
            carry = body(step, _at(loaded, slot), free, carry)
            plgpu.commit_smem()  # also the point where all warps have read their inputs
            for tile, buffer in _pairs(stores, stored):
                plgpu.copy_smem_to_gmem(buffer.at[out], tile.at(step), commit_group=False)
            if stores:
                plgpu.commit_smem_to_gmem_group()

            @pl.when(step + stages < steps)
            def _():
                fetch(step + stages, slot)

            return carry

        last = jax.lax.fori_loop(0, steps, advance, carry)
        if stores:
            plgpu.wait_smem_to_gmem(0)
        return last

    return pl.run_scoped(
        scoped,
        {name: [_buffer(stages, tile) for tile in tiles] for name, tiles in loads.items()},
        {name: [_buffer(slots, tile) for tile in tiles] for name, tiles in stores.items()},
        plgpu.Barrier(num_arrivals=sum(map(len, loads.values())), num_barriers=stages),
    )


def _pairs(tiles: Tiles, buffers: dict[str, list]) -> list[tuple[Tile, Any]]:
    return [pair for name in tiles for pair in zip(tiles[name], buffers[name])]


def _at(buffers: dict[str, list], slot: jax.Array) -> dict[str, list]:
    return {name: [buffer.at[slot] for buffer in some] for name, some in buffers.items()}


def _buffer(slots: int, tile: Tile) -> Any:
    shape = (slots, *tile.shape)
    return shared(shape, tile.ref.dtype, tile.swizzle) if tile.swizzle else plgpu.SMEM(shape, tile.ref.dtype)
