"""Attention of a chunk to single tokens on TPU, forward: a query at a time, its latents fetched row by row into VMEM.

A row is one DMA, and starting it takes the scalar core several cycles. So the rows of the next query are started on while this one's matrix
products run: both stand in one straight piece of code, for one tile of keys after the other. A grid step has two queries, with a buffer
each, so that the compiler sees that what is fetched is not what is read.

Rows of bfloat16 cannot be copied alone, as two share a word. They are packed into words of their own first, two columns each.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.sparse_attention.spec import NO_KEYS
from pallas_kernels.sparse_attention.tpu.blocks import product
from pallas_kernels.tpu import tiles
from pallas_kernels.tpu.tiles import LANES, Interpret

Array = jax.Array
TILE = 256  # keys whose products are worked on while as many rows are started on


def attend_tokens(
    q: Array, words: Array, index: Array, count: Array, *, rank: int, scale: float, interpret: Interpret = False
) -> tuple[Array, Array, Array]:
    """As `xla.attend_tokens`, bfloat16, with the words [B, T, s, 128] that `packed` makes of latents."""
    batch, length, heads, width = q.shape
    if batch * length % 2:
        q, index, count = (jnp.pad(x, ((0, 0), (0, 1), *((0, 0),) * (x.ndim - 2))) for x in (q, index, count))
        found = attend_tokens(q, words, index, count, rank=rank, scale=scale, interpret=interpret)
        return found[0][:, :length], found[1][:, :length], found[2][:, :length]
    queries, chosen = batch * length, tiles.round_up(index.shape[-1], TILE)
    cores = tiles.chip().cores if queries // 2 % tiles.chip().cores == 0 else 1
    each = queries // 2 // cores
    sequence = jnp.arange(batch, dtype=jnp.int32)[:, None, None] * words.shape[1]
    index = jnp.pad(index, ((0, 0), (0, 0), (0, chosen - index.shape[-1]))) + sequence
    q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, rank + LANES - width))).reshape(queries, heads, rank + LANES)

    def own(*block: int) -> pl.BlockSpec:
        return pl.BlockSpec((2, *block), lambda c, i, *_: (c * each + i, *(0,) * len(block)))

    def rows_of(query: int) -> pl.BlockSpec:
        """Of the even and the odd query of a step, and the even one of the next. Apart: places in one row of SMEM take less to compute."""

        def place(c: Any, i: Any, *_: Any) -> tuple[Any, int, int]:
            return 2 * (c * each + jnp.minimum(i + query // 2, each - 1)) + query % 2, 0, 0

        return pl.BlockSpec((1, 1, chosen), place, memory_space=pltpu.SMEM)

    rows = index.reshape(queries, 1, chosen)
    sums = jax.ShapeDtypeStruct((queries, 1, heads), jnp.float32)
    o, log_total, top = pl.pallas_call(
        functools.partial(_kernel, rank, scale, not interpret),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(cores, each),
            in_specs=[
                *[rows_of(query) for query in range(3)],
                own(heads, rank + LANES),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=[own(heads, rank), own(1, heads), own(1, heads)],
            scratch_shapes=[
                *[pltpu.VMEM((chosen, *words.shape[2:]), jnp.int32)] * 2,
                pltpu.VMEM((heads, rank), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct((queries, heads, rank), q.dtype), sums, sums],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=tiles.vmem_limit(tiles.chip()),
            disable_bounds_checks=True,  # of rows that the caller says are there: a check takes longer than starting the DMA
        ),
        interpret=interpret,
        name="sparse_tokens",
    )(count.reshape(-1), rows, rows, rows, q, words.reshape(-1, *words.shape[2:]))
    return o.reshape(batch, length, heads, rank), *(x.reshape(batch, length, heads) for x in (log_total, top))


def packed(latent: Array, rank: int, *, interpret: Interpret = False) -> Array:
    """Latents [B, T, K+R] bfloat16 -> words [B, T, s, 128] int32: column j < K/2 in a word's low half, j + K/2 in its high half.

    The R others follow in words of their own. s is a power of two, so that a row lies in one piece.
    """
    del interpret  # no kernel
    half = jax.lax.bitcast_convert_type(latent, jnp.uint16).astype(jnp.uint32)
    low, high, rest = half[..., : rank // 2], half[..., rank // 2 : rank], half[..., rank:]
    lines = pl.next_power_of_2(rank // (2 * LANES) + 1)
    word = jnp.concatenate([low | (high << 16), rest], axis=-1)
    word = jnp.pad(word, ((0, 0), (0, 0), (0, lines * LANES - word.shape[-1])))
    return jax.lax.bitcast_convert_type(word, jnp.int32).reshape(*latent.shape[:2], lines, LANES)


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
    attended: Any,
    arrived: Any,
) -> None:
    core, step, steps = pl.program_id(0), pl.program_id(1), pl.num_programs(1)
    chosen, heads = even.shape[0], q.shape[1]
    buffers = (even, odd)

    def fetch(index: Any, begin: Any, keys: int, slot: int, unroll: bool) -> None:
        def one(i: Any, _: Any) -> Any:
            pltpu.make_async_copy(words.at[index[0, 0, begin + i]], buffers[slot].at[begin + i], arrived.at[slot]).start()
            return _

        jax.lax.fori_loop(0, keys, one, 0, unroll=unroll)

    def wait(slot: int) -> None:
        pltpu.make_async_copy(buffers[slot], buffers[slot], arrived.at[slot]).wait()  # as many bytes as all rows have

    @pl.when(step == 0)
    def _() -> None:
        fetch(first, 0, chosen, 0, False)

    for query in range(2):
        some = count[2 * (core * steps + step) + query]
        wait(query)
        attended[...] = jnp.zeros_like(attended)

        def tile(t: Any, sums: tuple[Array, Array], query: int = query, some: Any = some) -> tuple[Array, Array]:
            begin = pl.multiple_of(t * TILE, TILE)
            fetch(third if query else second, begin, TILE, 1 - query, unroll)
            content, rotated = unpacked(buffers[query], begin, rank)
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
        log_total[query] = _to_row(largest + jnp.log(total))
        top[query] = _to_row(largest)

    @pl.when(step == steps - 1)
    def _() -> None:
        wait(0)


def unpacked(words: Any, begin: Any, rank: int) -> tuple[Array, Array]:
    """TILE rows of words [k, s, 128] in VMEM -> the first K columns [TILE, K] and the others, filled up to [TILE, 128], bfloat16."""
    lines = rank // (2 * LANES)
    apart = words.shape[1]
    flat = words.reshape(-1, LANES)
    parts = [flat[pl.ds(begin * apart + line, TILE, stride=apart), :] for line in range(lines + 1)]
    low, high = [_half(part << 16) for part in parts], [_half(part & -65536) for part in parts[:-1]]
    return jnp.concatenate([*low[:-1], *high], axis=1), low[-1]


def _half(word: Array) -> Array:
    return jax.lax.bitcast_convert_type(word, jnp.float32).astype(jnp.bfloat16)


def _to_row(column: Array) -> Array:
    """[heads, 1] -> [1, heads], by the diagonal."""
    heads = column.shape[0]
    row, at = (jax.lax.broadcasted_iota(jnp.int32, (heads, heads), axis) for axis in (0, 1))
    return jnp.sum(jnp.where(row == at, jnp.broadcast_to(column, (heads, heads)), 0.0), axis=0, keepdims=True)
