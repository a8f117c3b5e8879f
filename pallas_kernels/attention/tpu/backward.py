"""Dense attention on TPU, backward: for every block of keys one pass over the queries that see it, for all five gradients at once.

Logits are computed again from the saved logarithms of their sums (arXiv 2205.14135), once: the gradients of a head's keys and values are
summed over queries block by block, and those of its queries stand in VMEM until the head is done. A sequence whose queries do not fit there
is done in stretches of queries, and what the stretches give for keys and values is added up.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.tpu.blocks import HIDDEN, LOG2E, Blocks, blocks_of, joined, padded, padded_first, product, stretches, visible
from pallas_kernels.tpu import tiles
from pallas_kernels.tpu.tiles import LANES, Interpret

Array = jax.Array
BLOCK, PART = 1024, 256
HEADS_BYTES = 256 << 20  # of the float32 gradients of heads that are not yet summed or rounded


def dense_attention_backward(
    q_nope: Array,
    q_rope: Array,
    k_nope: Array,
    k_rope: Array,
    value: Array,
    first: Array,
    out: Array,
    log_total: Array,
    d_out: Array,
    scale: float,
    query_block: int,
    *,
    interpret: Interpret = False,
) -> tuple[Array, Array, Array, Array, Array]:
    """Gradients for q_nope, q_rope, k_nope, k_rope and value. Shapes as in `api.dense_attention`; `query_block` is for XLA."""
    heads, length, dtype = *q_nope.shape[1:3], q_nope.dtype
    blocks = blocks_of(length, BLOCK, PART)
    own = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1)
    rows = [padded(x, 2, blocks.queries)[:, :, None] for x in (log_total * LOG2E, own)]
    args = [padded(x, x.ndim - 2, blocks.queries) for x in (q_nope, q_rope, k_nope, k_rope, value, d_out)]
    first = padded_first(first, blocks.queries)
    parts = stretches(blocks, _most_queries(q_nope, q_rope, value, blocks.size))
    together = _heads_together(q_nope, q_rope, value, len(parts))

    def of_heads(offset: Array | None) -> tuple[list[Array], Array]:
        d_keys = jnp.float32 if len(parts) > 1 else dtype
        found = list(zip(*(_call(part, scale, args, rows, first, offset, together, d_keys, interpret) for part in parts)))
        d_q_nope, d_q_rope = (jnp.concatenate(pieces, axis=2)[:, :, :length] for pieces in found[:2])
        d_k_nope, d_k_rope, d_value = (_sum_of_fronts(pieces)[:, :, :length] for pieces in found[2:])
        # What each head has of the rotated key's gradient is float32, and summed over heads in a fixed order.
        return [d_q_nope, d_q_rope, d_k_nope.astype(dtype), d_value.astype(dtype)], d_k_rope.sum(axis=1)

    def add(total: Array, offset: Array) -> tuple[Array, list[Array]]:
        made, d_k_rope = of_heads(offset)
        return total + d_k_rope, made

    if together == heads:
        made, d_k_rope = of_heads(None)
    else:
        d_k_rope, stacked = jax.lax.scan(add, jnp.zeros(k_rope.shape, jnp.float32), jnp.arange(0, heads, together, dtype=jnp.int32))
        made = [jnp.moveaxis(x, 0, 1).reshape(x.shape[1], heads, *x.shape[3:]) for x in stacked]
    d_q_nope, d_q_rope, d_k_nope, d_value = made
    return d_q_nope, d_q_rope, d_k_nope, d_k_rope.astype(dtype), d_value


def _heads_together(q_nope: Array, q_rope: Array, value: Array, parts: int) -> int:
    """Heads whose float32 gradients of keys exist at a time: of the rotated one alone, or where there are stretches of all, for each."""
    (batch, heads, length, width), rope = q_nope.shape, tiles.round_up(q_rope.shape[3], LANES)
    of_token = rope if parts == 1 else (width + rope + value.shape[3]) * (parts + 1) // 2
    most = HEADS_BYTES // (4 * batch * length * of_token)
    return max((n for n in range(1, heads + 1) if heads % n == 0 and n <= most), default=1)


def _most_queries(q_nope: Array, q_rope: Array, value: Array, size: int) -> int:
    """Queries whose gradients VMEM holds, in float32 and twice in their type, beside the blocks and what is computed of them."""
    both = q_nope.shape[3] + tiles.round_up(q_rope.shape[3], LANES)
    beside = size * (4 * PART * 4 + (2 * both + 2 * value.shape[3]) * (2 * q_nope.dtype.itemsize + 4) * 2)
    return (tiles.vmem_limit(tiles.chip()) - beside) // (both * (4 + 2 * q_nope.dtype.itemsize))


def _sum_of_fronts(parts: Sequence[Array]) -> Array:
    """The sum of [B, H, keys, W] with zeros at the end of the shorter ones; the last is the longest."""
    total = parts[-1]
    for part in parts[-2::-1]:
        total = jax.lax.dynamic_update_slice_in_dim(total, total[:, :, : part.shape[2]] + part, 0, axis=2)
    return total


def _call(
    blocks: Blocks,
    scale: float,
    args: list[Array],
    rows: list[Array],
    first: Array,
    offset: Array | None,
    heads: int,
    d_keys: Any,
    interpret: Interpret,
) -> list[Array]:
    """Gradients of the queries of a stretch, and of all keys up to its end; those of `k_nope` and `value` in type `d_keys`.

    Of `heads` heads, from `offset` on if there are more.
    """
    q_nope, q_rope, _, _, value, _ = args
    batch, _, _, width = q_nope.shape
    rope, out_width, size = q_rope.shape[3], value.shape[3], blocks.size
    both = width + tiles.round_up(rope, LANES)

    def of_all(head: Array, scalars: tuple[Any, ...]) -> Array:
        """A head's number among all. Without an offset nothing is read, so that the static cost model can follow."""
        return head if offset is None else head + scalars[1][0]

    def at(width: int, side: int) -> pl.BlockSpec:
        return pl.BlockSpec(
            (1, 1, size, width), lambda b, h, row, step, *scalars: (b, of_all(h, scalars), blocks.queries_of_keys(row, step)[side], 0)
        )

    def made_at(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, size, width), lambda b, h, row, step, *_: (b, h, blocks.queries_of_keys(row, step)[1], 0))

    def whole(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, blocks.queries, width), lambda b, h, row, step, *_: (b, h, 0, 0))

    row_of_queries = pl.BlockSpec(
        (1, 1, 1, size), lambda b, h, row, step, *scalars: (b, of_all(h, scalars), 0, blocks.queries_of_keys(row, step)[0])
    )
    shared = pl.BlockSpec((1, size, rope), lambda b, h, row, step, *_: (b, blocks.queries_of_keys(row, step)[1], 0))
    of_first = pl.BlockSpec((1, 1, size), lambda b, h, row, step, *_: (b, 0, blocks.queries_of_keys(row, step)[0]))

    def array(tokens: int, width: int, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, heads, tokens, width), dtype)

    scalars = [first[:, 0, ::size]] if offset is None else [first[:, 0, ::size], offset[None]]
    return pl.pallas_call(
        lambda begins, *refs: _kernel(blocks, scale, begins, *refs[len(scalars) - 1 :]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(batch, heads, *blocks.grid),
            in_specs=[
                at(width, 0),
                at(rope, 0),
                at(width, 1),
                shared,
                at(out_width, 1),
                at(out_width, 0),
                row_of_queries,
                row_of_queries,
                of_first,
            ],
            out_specs=[whole(width), whole(rope), made_at(width), made_at(rope), made_at(out_width)],
            scratch_shapes=[
                pltpu.VMEM((both, blocks.queries), jnp.float32),
                pltpu.VMEM((size, both), jnp.float32),
                pltpu.VMEM((size, out_width), jnp.float32),
            ],
        ),
        out_shape=[
            array(blocks.queries, width, q_nope.dtype),
            array(blocks.queries, rope, q_nope.dtype),
            array(blocks.keys, width, d_keys),
            array(blocks.keys, rope, jnp.float32),
            array(blocks.keys, out_width, d_keys),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=tiles.vmem_limit(tiles.chip())
        ),
        interpret=interpret,
        name="dense_attention_backward",
    )(*scalars, *args, *rows, first)


def _kernel(
    blocks: Blocks,
    scale: float,
    begins: Any,
    q_nope: Any,
    q_rope: Any,
    k_nope: Any,
    k_rope: Any,
    value: Any,
    d_out: Any,
    log_total: Any,
    own: Any,
    first: Any,
    d_q_nope: Any,
    d_q_rope: Any,
    d_k_nope: Any,
    d_k_rope: Any,
    d_value: Any,
    d_query: Any,
    d_key: Any,
    d_values: Any,
) -> None:
    """`log_total` counts in powers of two; `own`: sum over V of out times its gradient.

    `d_query` [D+R, queries] (transposed), `d_key` [K, D+R] and `d_values` [K, V] are what is summed, without the scale.
    """
    row, step = pl.program_id(2), pl.program_id(3)
    rows, steps = blocks.grid
    of_queries, of_keys, new = blocks.queries_of_keys(row, step)
    diagonal = of_queries == of_keys
    begins_keys = diagonal | (of_queries == blocks.before) if blocks.before else diagonal
    width, rope = d_q_nope.shape[3], d_q_rope.shape[3]

    @pl.when((row == 0) & (step == 0))
    def _begin_head() -> None:
        d_query[...] = jnp.zeros(d_query.shape, jnp.float32)

    @pl.when(new & begins_keys)
    def _begin_keys() -> None:
        d_key[...] = jnp.zeros(d_key.shape, jnp.float32)
        d_values[...] = jnp.zeros(d_values.shape, jnp.float32)

    def differentiate(on_diagonal: bool) -> None:
        query = joined(q_nope[0, 0], q_rope[0, 0])
        start = pl.multiple_of((of_queries - blocks.before) * blocks.size, blocks.size)
        for part in range(blocks.parts):
            skipped = part * blocks.part if on_diagonal else 0
            at, columns = slice(part * blocks.part, (part + 1) * blocks.part), slice(skipped, blocks.size)
            key = joined(k_nope[0, 0, at, :], k_rope[0, at, :])
            logit = product(key, query[columns], (1, 1)) * (scale * LOG2E)
            seen = visible(blocks, first[0, :, columns], of_queries, of_keys, part, diagonal=on_diagonal)
            weight = jnp.exp2(jnp.where(seen, logit, HIDDEN) - log_total[0, 0, :, columns])
            d_weight = product(value[0, 0, at, :], d_out[0, 0, columns, :], (1, 1))
            d_logit = (weight * (d_weight - own[0, 0, :, columns])).astype(query.dtype)
            d_values[at, :] += product(weight.astype(query.dtype), d_out[0, 0, columns, :], (1, 0))
            d_key[at, :] += product(d_logit, query[columns], (1, 0))
            d_query[:, pl.ds(start + skipped, blocks.size - skipped)] += product(key, d_logit, (0, 0))

    pl.when(new & diagonal)(lambda: differentiate(True))
    # Documents do not overlap: what the first query of a block does not see, no query of it sees.
    seen = (of_keys + 1) * blocks.size > begins[pl.program_id(0), of_queries]
    pl.when(new & jnp.logical_not(diagonal) & seen)(lambda: differentiate(False))

    @pl.when(new & (of_queries == blocks.before + blocks.count - 1))
    def _end_keys() -> None:
        d_k_nope[0, 0] = (d_key[:, :width] * scale).astype(d_k_nope.dtype)
        d_k_rope[0, 0] = d_key[:, width : width + rope] * scale
        d_value[0, 0] = d_values[...].astype(d_value.dtype)

    @pl.when((row == rows - 1) & (step == steps - 1))
    def _end_head() -> None:
        def write(block: Any, _: Any) -> None:
            at = pl.ds(pl.multiple_of(block * blocks.size, blocks.size), blocks.size)
            turned = (d_query[:, at] * scale).T
            d_q_nope[0, 0, at, :] = turned[:, :width].astype(d_q_nope.dtype)
            d_q_rope[0, 0, at, :] = turned[:, width : width + rope].astype(d_q_rope.dtype)

        jax.lax.fori_loop(0, blocks.count, write, None)
