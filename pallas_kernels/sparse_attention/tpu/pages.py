"""Attention of a chunk to pages on TPU, forward: a group of queries against all keys of its block at once.

All heads of a group's queries are the rows of two matrix products with the same latents, so the softmax needs no running maximum.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.sparse_attention.spec import NO_KEYS
from pallas_kernels.sparse_attention.tpu.blocks import Shape, hidden, latents_of_block, page_arguments, product, shape_of, to_rows
from pallas_kernels.tpu import tiles
from pallas_kernels.tpu.tiles import Interpret

Array = jax.Array


def attend_pages(
    q: Array,
    latent: Array,
    index: Array,
    count: Array,
    first: Array,
    stop: Array,
    *,
    rank: int,
    scale: float,
    interpret: Interpret = False,
) -> tuple[Array, Array, Array]:
    """As `xla.attend_pages`, bfloat16; C is a multiple of PAGE."""
    shape = shape_of(q, rank, index.shape[-1])
    batch, length, heads, width = q.shape
    page, token, spans, latent = page_arguments(shape, latent, index, count, first, stop)
    sums = jax.ShapeDtypeStruct((batch * length, heads), jnp.float32)
    o, log_total, top = pl.pallas_call(
        functools.partial(_kernel, shape, scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=shape.grid,
            in_specs=[
                shape.by_block(1, shape.keys),
                shape.by_group(2),
                shape.by_group(heads, width),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=[shape.by_group(heads, rank), shape.by_group(heads), shape.by_group(heads)],
            scratch_shapes=shape.buffers,
        ),
        out_shape=[jax.ShapeDtypeStruct((batch * length, heads, rank), q.dtype), sums, sums],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=tiles.vmem_limit(tiles.chip())
        ),
        interpret=interpret,
        name="sparse_pages",
    )(page, token, spans, q.reshape(-1, heads, width), latent)
    return o.reshape(batch, length, heads, rank), log_total.reshape(batch, length, heads), top.reshape(batch, length, heads)


def _kernel(
    shape: Shape,
    scale: float,
    page: Any,
    token: Any,
    spans: Any,
    q: Any,
    latent: Any,
    o: Any,
    log_total: Any,
    top: Any,
    buffer: Any,
    arrived: Any,
) -> None:
    keys = latents_of_block(shape, page, latent, buffer, arrived)
    dots = product(q[...].reshape(shape.rows, shape.width), keys[...], (1, 1))
    logits = (dots * scale).reshape(shape.queries, shape.heads, shape.keys) + hidden(token, spans)[:, None]
    logits = logits.reshape(shape.rows, shape.keys)
    largest = jnp.maximum(logits.max(axis=-1, keepdims=True), NO_KEYS)
    weight = jnp.exp(logits - largest)  # 0 where nothing is seen, as the largest is then far above
    total = weight.sum(axis=-1, keepdims=True)
    total = jnp.where(total > 0, total, 1.0)
    attended = product(weight.astype(jnp.bfloat16), keys[:, : shape.rank], (1, 0)) * (1 / total)
    o[...] = attended.astype(o.dtype).reshape(o.shape)
    log_total[...] = to_rows(largest + jnp.log(total), shape)
    top[...] = to_rows(largest, shape)
