"""The largest score of each page for each PAGE queries on TPU. The scores live in registers; what reaches HBM is 4096 times smaller."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.indexer.tpu import tile
from pallas_kernels.indexer.tpu.tile import Ref, Shape, for_visible_tiles, operands, specs
from pallas_kernels.tpu import tiles
from pallas_kernels.tpu.tiles import LANES
from pallas_kernels.visible import PAGE, Span

Array = jax.Array

MOST_KEYS = LANES * PAGE  # of a grid step: their pages fill a register's lanes


def page_scores(q: Array, k: Array, weight: Array, span: Span, query_chunk: int, *, interpret: tiles.Interpret = False) -> Array:
    """`xla.page_scores`: q [B, S, J, I] and k [B, T, I] bfloat16, I a multiple of 128. `query_chunk` is of no concern: nothing is kept."""
    chip = tiles.chip()
    causal = q.shape[1] == k.shape[1]  # then `api` has kept the spans from the future
    given = operands(q, k, weight, span, chip, most_queries=tile.QUERY_BLOCK, most_keys=MOST_KEYS, causal=causal)
    shape = given.shape
    batch, length, keys = q.shape[0], q.shape[1], k.shape[1]
    rows, pages = shape.groups, shape.keys // PAGE
    out = pl.pallas_call(
        functools.partial(_kernel, shape),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(shape.query_blocks, batch, shape.key_blocks),
            in_specs=specs(shape),
            out_specs=pl.BlockSpec((1, rows, pages), lambda i, b, n, _: (b, shape.block(i), n)),
            scratch_shapes=[pltpu.VMEM((rows, shape.keys), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((batch, shape.query_blocks * rows, shape.key_blocks * pages), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=tiles.vmem_limit(chip)
        ),
        interpret=interpret,
        name="index_page_scores",
    )(given.bounds, given.q, given.k, given.columns)
    return out[:, : -(-length // PAGE), : -(-keys // PAGE)]


def _kernel(shape: Shape, bounds: Ref, q: Ref, k: Ref, columns: Ref, out: Ref, largest: Ref) -> None:
    largest[...] = jnp.full(largest.shape, -jnp.inf, largest.dtype)

    def keep(group: Any, rows: Any, at: Any, start: Any) -> None:
        scores = tile.scores_of(shape, q, k[0, at, :], columns, rows, start)
        largest[pl.ds(group, 1), at] = scores.max(axis=0, keepdims=True)

    for_visible_tiles(shape, bounds, keep)
    out[0] = _of_pages(largest)


def _of_pages(largest: Ref) -> Array:
    """[rows, keys] -> maxima over each PAGE lanes [rows, keys / PAGE]."""
    rows, keys = largest.shape
    lane = jax.lax.broadcasted_iota(jnp.int32, (rows, keys // PAGE), 1)
    found = jnp.full((rows, keys // PAGE), -jnp.inf, jnp.float32)
    for at in range(0, keys, LANES):
        x = largest[:, at : at + LANES]
        for step in (32, 16, 8, 4, 2, 1):  # lane l then has the maximum of lanes l to l + 63
            x = jnp.maximum(x, pltpu.roll(x, LANES - step, 1))
        for page in range(at // PAGE, (at + LANES) // PAGE):
            begin = page * PAGE - at
            found = jnp.where(lane == page, x[:, begin : begin + 1], found)
    return found
