"""Dense attention on TPU, forward: for every block of queries one pass over its keys, with the softmax built up as they come.

Three things are under way at a time, on parts of a block: the logits of one part (matrix units), the weights of the part before (vector
units), and the product of those before that with their values (matrix units). They share no data, so that the compiler can overlap them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.spec import Attended
from pallas_kernels.attention.tpu.blocks import HIDDEN, LOG2E, Blocks, blocks_of, joined, padded, padded_first, product, visible
from pallas_kernels.tpu import tiles
from pallas_kernels.tpu.tiles import LANES, Interpret

Array = jax.Array
BLOCK, PART = 1024, 256
SUBLANES = 8


def dense_attention(
    q_nope: Array,
    q_rope: Array,
    k_nope: Array,
    k_rope: Array,
    value: Array,
    first: Array,
    scale: float,
    query_block: int,
    *,
    interpret: Interpret = False,
) -> Attended:
    """Shapes as in `api.dense_attention`; D and V multiples of 128, R of 64. `query_block` is for XLA."""
    batch, heads, length, width = q_nope.shape
    rope, out_width = q_rope.shape[3], value.shape[3]
    blocks = blocks_of(length, BLOCK, PART)
    size = blocks.size
    args = (*(padded(x, 2, blocks.queries) for x in (q_nope, q_rope, k_nope)), padded(k_rope, 1, blocks.queries))
    first = padded_first(first, blocks.queries)

    def at(width: int, side: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, size, width), lambda b, h, row, step, *_: (b, h, blocks.keys_of_queries(row, step)[side], 0))

    row_of_queries = pl.BlockSpec((1, 1, 1, size), lambda b, h, row, step, *_: (b, h, 0, blocks.keys_of_queries(row, step)[0]))
    shared = pl.BlockSpec((1, size, rope), lambda b, h, row, step, *_: (b, blocks.keys_of_queries(row, step)[1], 0))
    of_first = pl.BlockSpec((1, 1, size), lambda b, h, row, step, *_: (b, 0, blocks.keys_of_queries(row, step)[0]))
    number = jax.ShapeDtypeStruct((batch, heads, 1, blocks.queries), jnp.float32)
    out, log_total, top = pl.pallas_call(
        functools.partial(_kernel, blocks, scale * LOG2E),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, *blocks.grid),
            in_specs=[at(width, 0), at(rope, 0), at(width, 1), shared, at(out_width, 1), of_first],
            out_specs=[at(out_width, 0), row_of_queries, row_of_queries],
            scratch_shapes=[
                pltpu.VMEM((size, width + tiles.round_up(rope, LANES)), q_nope.dtype),
                pltpu.VMEM((SUBLANES, size), jnp.float32),
                pltpu.VMEM((SUBLANES, size), jnp.float32),
                pltpu.VMEM((out_width, size), jnp.float32),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct((batch, heads, blocks.queries, out_width), value.dtype), number, number],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=tiles.vmem_limit(tiles.chip())
        ),
        interpret=interpret,
        name="dense_attention",
    )(first[:, 0, ::size], *args, padded(value, 2, blocks.queries), first)
    return Attended(out[:, :, :length], log_total[:, :, 0, :length], top[:, :, 0, :length])


def _kernel(
    blocks: Blocks,
    factor: float,
    begins: Any,
    q_nope: Any,
    q_rope: Any,
    k_nope: Any,
    k_rope: Any,
    value: Any,
    first: Any,
    out: Any,
    log_total: Any,
    top: Any,
    query: Any,
    largest: Any,
    total: Any,
    sums: Any,
) -> None:
    """`query`: both parts joined. `largest` [8, Q]: the largest logit so far, in every sublane. `total` [8, Q]: partial sums of weights.

    `sums` [V, Q]: weighted sums of values. Logits count in powers of two: `factor` is the scale over log 2. `begins`: where the document of
    a block's first query begins.
    """
    row, step = pl.program_id(2), pl.program_id(3)
    of_queries, of_keys, new = blocks.keys_of_queries(row, step)
    last = of_queries == of_keys

    @pl.when(new & (of_keys == 0))
    def _begin() -> None:
        largest[...] = jnp.full(largest.shape, HIDDEN, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        sums[...] = jnp.zeros(sums.shape, jnp.float32)
        query[...] = joined(q_nope[0, 0], q_rope[0, 0])

    def attend(diagonal: bool) -> None:
        def columns(part: int) -> slice:
            """The queries that may see a part."""
            return slice(part * blocks.part if diagonal else 0, blocks.size)

        def keys(part: int) -> slice:
            return slice(part * blocks.part, (part + 1) * blocks.part)

        def logits(part: int) -> Array:
            at = keys(part)
            dots = product(joined(k_nope[0, 0, at, :], k_rope[0, at, :]), query[columns(part), :], (1, 1)) * factor
            seen = visible(blocks, first[0, :, columns(part)], of_queries, of_keys, part, diagonal=diagonal)
            return jnp.where(seen, dots, HIDDEN)

        def weights(part: int, logit: Array) -> tuple[Array, Array]:
            at = columns(part)
            before = largest[:, at]
            now = jnp.maximum(before, logit.max(axis=0, keepdims=True))
            weight = jnp.exp2(_by_sublane(logit) - now[None])
            decay = jnp.exp2(before - now)
            largest[:, at] = now
            total[:, at] = total[:, at] * decay + weight.sum(axis=0)
            return decay, weight.reshape(logit.shape).astype(value.dtype)

        def accumulate(part: int, decay: Array, weight: Array) -> None:
            at = columns(part)
            kept = _by_sublane(sums[:, at]) * decay[None]
            sums[:, at] = kept.reshape(sums.shape[0], -1) + product(value[0, 0, keys(part), :], weight, (0, 0))

        logit: dict[int, Array] = {}
        weight: dict[int, tuple[Array, Array]] = {}
        for time in range(blocks.parts + 2):
            if time < blocks.parts:
                logit[time] = logits(time)
            if 0 <= time - 1 < blocks.parts:
                weight[time - 1] = weights(time - 1, logit.pop(time - 1))
            if time >= 2:
                accumulate(time - 2, *weight.pop(time - 2))

    pl.when(new & last)(lambda: attend(True))
    # Documents do not overlap, so what the first query of a block does not see, no query of it sees.
    seen = (of_keys + 1) * blocks.size > begins[pl.program_id(0), of_queries]
    pl.when(new & jnp.logical_not(last) & seen)(lambda: attend(False))

    @pl.when(new & last)
    def _end() -> None:
        all_total = total[...].sum(axis=0, keepdims=True)
        out[0, 0] = (sums[...] / all_total).T.astype(out.dtype)
        log_total[0, 0] = (largest[:1, :] + jnp.log2(all_total)) / LOG2E
        top[0, 0] = largest[:1, :] / LOG2E


def _by_sublane(x: Array) -> Array:
    """[8 k, Q] -> [k, 8, Q]: whole registers, so that what is [8, Q] applies to each."""
    return x.reshape(-1, SUBLANES, x.shape[1])
