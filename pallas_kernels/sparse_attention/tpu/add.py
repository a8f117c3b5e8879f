"""Adding the gradients of blocks of queries to the latents' gradient on TPU, in the order of the blocks.

A block's pages are read, added to and written back before those of the next are read: its pages differ from each other, those of two blocks
need not.
"""

from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu import tiles
from pallas_kernels.tpu.tiles import Interpret
from pallas_kernels.visible import PAGE

Array = jax.Array


def add_pages(total: Array, page: Array, parts: Array, *, interpret: Interpret = False) -> Array:
    """`total` [N, W] float32, N whole pages, with `parts` [n, p PAGE, W] added; page [n, p] says where each PAGE rows of them belong."""
    blocks, keys, width = parts.shape
    return pl.pallas_call(
        _kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(blocks,),
            in_specs=[pl.BlockSpec((1, keys, width), lambda b, _: (b, 0, 0)), pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[pltpu.VMEM((keys, width), total.dtype), pltpu.SemaphoreType.DMA],
        ),
        out_shape=jax.ShapeDtypeStruct(total.shape, total.dtype),
        input_output_aliases={2: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=tiles.vmem_limit(tiles.chip())),
        interpret=interpret,
        name="sparse_add_pages",
    )(page, parts, total)


def _kernel(page: Any, part: Any, before: Any, total: Any, buffer: Any, arrived: Any) -> None:
    del before  # the same memory as `total`
    block, pages = pl.program_id(0), part.shape[1] // PAGE

    def each_page(copy: Any) -> None:
        def one(j: Any, _: Any) -> Any:
            copy(total.at[pl.ds(page[block, j] * PAGE, PAGE)], buffer.at[pl.ds(j * PAGE, PAGE)])
            return _

        jax.lax.fori_loop(0, pages, one, 0)
        pltpu.make_async_copy(buffer, buffer, arrived).wait()  # as many bytes as all pages have

    each_page(lambda there, here: pltpu.make_async_copy(there, here, arrived).start())
    buffer[...] += part[0]
    each_page(lambda there, here: pltpu.make_async_copy(here, there, arrived).start())
