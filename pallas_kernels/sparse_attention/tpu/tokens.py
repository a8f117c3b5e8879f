"""Attention of a chunk to single tokens on TPU, forward: a query at a time, over tiles of its keys, with a running maximum."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.sparse_attention.spec import NO_KEYS
from pallas_kernels.sparse_attention.tpu.blocks import product
from pallas_kernels.sparse_attention.tpu.rows import TILE, each_query, filled, rows_of, steps_of, to_row, unpacked
from pallas_kernels.tpu import tiles
from pallas_kernels.tpu.tiles import LANES, Interpret

Array = jax.Array


def attend_tokens(
    q: Array, words: Array, index: Array, count: Array, *, rank: int, scale: float, interpret: Interpret = False
) -> tuple[Array, Array, Array]:
    """As `xla.attend_tokens`, bfloat16, with the words [B, T, s, 128] that `rows.packed` makes of latents."""
    batch, length, heads, _ = q.shape
    if batch * length % 2:
        q, index, count = (jnp.pad(x, ((0, 0), (0, 1), *((0, 0),) * (x.ndim - 2))) for x in (q, index, count))
        found = attend_tokens(q, words, index, count, rank=rank, scale=scale, interpret=interpret)
        return found[0][:, :length], found[1][:, :length], found[2][:, :length]
    queries = batch * length
    steps = steps_of(queries, index.shape[-1])
    rows = rows_of(index, steps.keys, words.shape[1])
    sums = jax.ShapeDtypeStruct((queries, 1, heads), jnp.float32)
    o, log_total, top = pl.pallas_call(
        functools.partial(_kernel, rank, scale, not interpret),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=steps.grid,
            in_specs=[*steps.rows, steps.by_step(heads, rank + LANES), pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=[steps.by_step(heads, rank), steps.by_step(1, heads), steps.by_step(1, heads)],
            scratch_shapes=[*steps.buffers(words.shape[2]), pltpu.VMEM((heads, rank), jnp.float32)],
        ),
        out_shape=[jax.ShapeDtypeStruct((queries, heads, rank), q.dtype), sums, sums],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=tiles.vmem_limit(tiles.chip()),
            disable_bounds_checks=True,  # of rows that the caller says are there: a check takes longer than starting the DMA
        ),
        interpret=interpret,
        name="sparse_tokens",
    )(count.reshape(-1), rows, rows, rows, filled(q, rank + LANES), words.reshape(-1, *words.shape[2:]))
    return o.reshape(batch, length, heads, rank), *(x.reshape(batch, length, heads) for x in (log_total, top))


def _kernel(
    rank: int,
    scale: float,
    unroll: bool,
    count: Any,
    first: Any,
    second: Any,
    third: Any,
    q: Any,
    words: Any,
    o: Any,
    log_total: Any,
    top: Any,
    even: Any,
    odd: Any,
    arrived: Any,
    attended: Any,
) -> None:
    place = 2 * (pl.program_id(0) * pl.num_programs(1) + pl.program_id(1))
    chosen, heads = even.shape[0], q.shape[1]

    def one(query: int, fetch: Any) -> None:
        some = count[place + query]
        attended[...] = jnp.zeros_like(attended)

        def tile(t: Any, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            begin = pl.multiple_of(t * TILE, TILE)
            fetch(begin)
            content, rotated = unpacked((even, odd)[query], begin, rank)
            dots = product(q[query, :, :rank], content, (1, 1)) + product(q[query, :, rank:], rotated, (1, 1))
            key_at = jax.lax.broadcasted_iota(jnp.int32, (1, TILE), 1) + begin
            logits = dots * scale + jnp.where(key_at < some, 0.0, 10 * NO_KEYS)
            before, total = sums
            largest = jnp.maximum(before, logits.max(axis=-1, keepdims=True))
            weight = jnp.exp(logits - largest)
            shrink = jnp.exp(before - largest)
            attended[...] = attended[...] * shrink + product(weight.astype(jnp.bfloat16), content, (1, 0))
            return largest, total * shrink + weight.sum(axis=-1, keepdims=True)

        start = (jnp.full((heads, 1), NO_KEYS, jnp.float32), jnp.zeros((heads, 1), jnp.float32))
        largest, total = jax.lax.fori_loop(0, chosen // TILE, tile, start)
        total = jnp.where(total > 0, total, 1.0)
        o[query] = (attended[...] * (1 / total)).astype(o.dtype)
        log_total[query] = to_row(largest + jnp.log(total))
        top[query] = to_row(largest)

    each_query((first, second, third), words, (even, odd), arrived, unroll)(one)
