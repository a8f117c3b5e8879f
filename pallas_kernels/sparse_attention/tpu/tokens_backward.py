"""Attention of a chunk to single tokens on TPU, backward: the gradients of its queries, and of the latents in two steps.

The kernel here works on a query at a time, as the forward pass does, and computes its probabilities again. They and the logits' gradients
are written out, in bfloat16: 1 MiB for 128 heads and 2048 keys, where the gradients of its latents would be 5. `scatter` has these.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.sparse_attention.spec import NO_KEYS
from pallas_kernels.sparse_attention.tpu.blocks import product
from pallas_kernels.sparse_attention.tpu.rows import TILE, each_query, filled, rows_of, steps_of, to_column, unpacked
from pallas_kernels.sparse_attention.tpu.scatter import scatter
from pallas_kernels.tpu import tiles
from pallas_kernels.tpu.tiles import LANES, Interpret

Array = jax.Array


def attend_tokens_backward(
    q: Array,
    words: Array,
    index: Array,
    count: Array,
    log_total: Array,
    own: Array,
    d_o: Array,
    d_latent: Array,
    *,
    scale: float,
    interpret: Interpret = False,
) -> tuple[Array, Array, Array]:
    """As `xla.attend_tokens_backward`, bfloat16, with the words that `rows.packed` makes of latents and a sum of `scatter.sum_of`."""
    batch, length, heads, width = q.shape
    rank, keys = d_o.shape[-1], words.shape[1]
    missing = -batch * length % (2 * len(d_latent))
    chosen = tiles.round_up(index.shape[-1], TILE)
    given = (
        rows_of(index, chosen, keys),
        filled(q, rank + LANES),
        filled(d_o, rank),
        *(x.reshape(-1, 1, heads) for x in (log_total, own)),
        count.reshape(-1),
    )
    rows, q, d_o, log_total, own, count = (jnp.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1))) for x in given)
    queries, steps = len(q), steps_of(len(q), chosen)
    d_q, o, factors = pl.pallas_call(
        functools.partial(_kernel, rank, scale, not interpret),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=steps.grid,
            in_specs=[
                *steps.rows,
                steps.by_step(1, heads),
                steps.by_step(1, heads),
                steps.by_step(heads, rank + LANES),
                steps.by_step(heads, rank),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=[steps.by_step(heads, width), steps.by_step(heads, rank), steps.by_step(2 * heads, chosen)],
            scratch_shapes=[
                *steps.buffers(words.shape[2]),
                pltpu.VMEM((2 * heads, rank), jnp.float32),
                pltpu.VMEM((heads, LANES), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((queries, heads, width), q.dtype),
            jax.ShapeDtypeStruct((queries, heads, rank), q.dtype),
            jax.ShapeDtypeStruct((queries, 2 * heads, chosen), q.dtype),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=tiles.vmem_limit(tiles.chip()),
            disable_bounds_checks=True,  # see `tokens`
        ),
        interpret=interpret,
        name="sparse_tokens_backward",
    )(count, rows, rows, rows, log_total, own, q, d_o, words.reshape(-1, *words.shape[2:]))
    d_latent = scatter(d_latent, rows[:, 0], count, factors, q, d_o, keys, interpret=interpret)
    queries = batch * length
    return d_q[:queries].reshape(batch, length, heads, width), o[:queries].reshape(batch, length, heads, rank), d_latent


def _kernel(
    rank: int,
    scale: float,
    unroll: bool,
    count: Any,
    first: Any,
    second: Any,
    third: Any,
    log_total: Any,
    own: Any,
    q: Any,
    d_o: Any,
    words: Any,
    d_q: Any,
    o: Any,
    factors: Any,
    even: Any,
    odd: Any,
    arrived: Any,
    sums: Any,
    rotated_sums: Any,
) -> None:
    place = 2 * (pl.program_id(0) * pl.num_programs(1) + pl.program_id(1))
    chosen, heads = even.shape[0], q.shape[1]

    def one(query: int, fetch: Any) -> None:
        some = count[place + query]
        top, mean = to_column(log_total[query]), to_column(own[query])
        sums[...] = jnp.zeros_like(sums)
        rotated_sums[...] = jnp.zeros_like(rotated_sums)

        def tile(t: Any, _: Any) -> Any:
            begin = pl.multiple_of(t * TILE, TILE)
            fetch(begin)
            content, rotated = unpacked((even, odd)[query], begin, rank)
            dots = product(q[query, :, :rank], content, (1, 1)) + product(q[query, :, rank:], rotated, (1, 1))
            key_at = jax.lax.broadcasted_iota(jnp.int32, (1, TILE), 1) + begin
            weight = jnp.exp(dots * scale + jnp.where(key_at < some, 0.0, 10 * NO_KEYS) - top)
            d_logits = weight * (product(d_o[query], content, (1, 1)) - mean) * scale
            both = jnp.concatenate([d_logits.astype(jnp.bfloat16), weight.astype(jnp.bfloat16)], axis=0)
            factors[query, :, pl.ds(begin, TILE)] = both
            sums[...] += product(both, content, (1, 0))
            rotated_sums[...] += product(both[:heads], rotated, (1, 0))
            return _

        jax.lax.fori_loop(0, chosen // TILE, tile, 0)
        d_q[query, :, :rank] = sums[:heads].astype(d_q.dtype)
        d_q[query, :, rank:] = rotated_sums[:, : d_q.shape[2] - rank].astype(d_q.dtype)
        o[query] = sums[heads:].astype(o.dtype)

    each_query((first, second, third), words, (even, odd), arrived, unroll)(one)
