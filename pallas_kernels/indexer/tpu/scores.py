"""The scores of a chunk of queries on TPU. Blocks of keys that none of a block's queries sees are not computed."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.indexer.tpu import tile
from pallas_kernels.indexer.tpu.tile import Ref, Shape, for_visible_tiles, operands, specs
from pallas_kernels.tpu import tiles
from pallas_kernels.visible import Span

Array = jax.Array

MOST_KEYS = 2048  # of a grid step: [512, 2048] float32 scores are 4 MiB


def index_scores(q: Array, k: Array, weight: Array, span: Span, *, interpret: tiles.Interpret = False) -> Array:
    """`xla.index_scores`: q [B, S, J, I] and k [B, T, I] bfloat16, I a multiple of 128."""
    chip = tiles.chip()
    most = tile.QUERY_BLOCK // chip.cores  # a chunk of so many queries is for all cores
    given = operands(q, k, weight, span, chip, most_queries=most, most_keys=MOST_KEYS)
    shape = given.shape
    batch, length, keys = q.shape[0], q.shape[1], k.shape[1]
    out = pl.pallas_call(
        functools.partial(_kernel, shape),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(shape.query_blocks, batch, shape.key_blocks),
            in_specs=specs(shape),
            out_specs=pl.BlockSpec((1, shape.queries, shape.keys), lambda i, b, n, _: (b, shape.block(i), n)),
        ),
        out_shape=jax.ShapeDtypeStruct((batch, given.q.shape[2], given.k.shape[1]), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=tiles.vmem_limit(chip)
        ),
        interpret=interpret,
        name="index_scores",
    )(given.bounds, given.q, given.k, given.columns)
    return out[:, :length, :keys]


def _kernel(shape: Shape, bounds: Ref, q: Ref, k: Ref, columns: Ref, out: Ref) -> None:
    out[...] = jnp.full(out.shape, -jnp.inf, out.dtype)

    def write(group: Any, rows: Any, at: Any, start: Any) -> None:
        out[0, rows, at] = tile.scores_of(shape, q, k[0, at, :], columns, rows, start)

    for_visible_tiles(shape, bounds, write)
