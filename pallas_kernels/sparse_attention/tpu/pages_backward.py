"""Attention of a chunk to pages on TPU, backward: a group of queries against all keys of its block at once.

The gradient of a block's latents is summed over its groups in VMEM and written once, apart for every block; `add.add_pages` adds them up.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.sparse_attention.tpu.add import add_pages
from pallas_kernels.sparse_attention.tpu.blocks import (
    Shape,
    hidden,
    latents_of_block,
    page_arguments,
    pages_to,
    product,
    shape_of,
    to_column,
)
from pallas_kernels.tpu import tiles
from pallas_kernels.tpu.tiles import Interpret
from pallas_kernels.visible import PAGE

Array = jax.Array


def attend_pages_backward(
    q: Array,
    latent: Array,
    index: Array,
    count: Array,
    first: Array,
    stop: Array,
    log_total: Array,
    own: Array,
    d_o: Array,
    d_latent: Array,
    *,
    scale: float,
    interpret: Interpret = False,
) -> tuple[Array, Array, Array]:
    """As `xla.attend_pages_backward`, bfloat16; C is a multiple of PAGE, and d_latent has `spec.accumulator_rows`."""
    shape = shape_of(q, d_o.shape[-1], index.shape[-1])
    batch, length, heads, width = q.shape
    rank = shape.rank
    page, token, spans, rows = page_arguments(shape, latent, index, count, first, stop)
    d_q, o, d_keys = pl.pallas_call(
        functools.partial(_kernel, shape, scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=shape.grid,
            in_specs=[
                shape.by_block(1, shape.keys),
                shape.by_group(2),
                shape.by_group(heads),
                shape.by_group(heads),
                shape.by_group(heads, width),
                shape.by_group(heads, rank),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=[shape.by_group(heads, width), shape.by_group(heads, rank), shape.by_block(shape.keys, width)],
            scratch_shapes=shape.buffers,
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch * length, heads, width), q.dtype),
            jax.ShapeDtypeStruct((batch * length, heads, rank), q.dtype),
            jax.ShapeDtypeStruct((batch * length // PAGE, shape.keys, width), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=tiles.vmem_limit(tiles.chip())
        ),
        interpret=interpret,
        name="sparse_pages_backward",
    )(
        page,
        token,
        spans,
        log_total.reshape(-1, heads),
        own.reshape(-1, heads),
        q.reshape(-1, heads, width),
        d_o.reshape(-1, heads, rank),
        rows,
    )
    to = pages_to(shape, d_latent, index, count)
    d_latent = add_pages(d_latent.reshape(-1, width), to, d_keys, interpret=interpret).reshape(d_latent.shape)
    return d_q.reshape(q.shape), o.reshape(d_o.shape), d_latent


def _kernel(
    shape: Shape,
    scale: float,
    page: Any,
    token: Any,
    spans: Any,
    log_total: Any,
    own: Any,
    q: Any,
    d_o: Any,
    latent: Any,
    d_q: Any,
    o: Any,
    d_keys: Any,
    buffer: Any,
    arrived: Any,
) -> None:
    keys = latents_of_block(shape, page, latent, buffer, arrived)
    queries, d_out = q[...].reshape(shape.rows, shape.width), d_o[...].reshape(shape.rows, shape.rank)
    values = keys[:, : shape.rank]
    dots = product(queries, keys[...], (1, 1))
    logits = (dots * scale).reshape(shape.queries, shape.heads, shape.keys) + hidden(token, spans)[:, None]
    weight = jnp.exp(logits.reshape(shape.rows, shape.keys) - to_column(log_total[...], shape))
    d_weight = product(d_out, values, (1, 1))
    d_logits = (weight * (d_weight - to_column(own[...], shape)) * scale).astype(jnp.bfloat16)
    weight = weight.astype(jnp.bfloat16)
    o[...] = product(weight, values, (1, 0)).astype(o.dtype).reshape(o.shape)
    d_q[...] = product(d_logits, keys[...], (1, 0)).astype(d_q.dtype).reshape(d_q.shape)

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        d_keys[...] = jnp.zeros_like(d_keys)

    d_keys[0] += product(d_logits, queries, (0, 0))
    d_keys[0, :, : shape.rank] += product(weight, d_out, (0, 0))
