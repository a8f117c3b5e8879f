"""The two kernels that go back through attention to selected latents. Both compute the logits again.

gradient_of_queries: one program for each query and 64 of its heads; tiles of 32 latents pass by.
gradient_of_latents: one program for each tile of 64 latents of a list; the queries of the list pass by, 32 rows (a query's heads) at a
time. It writes the share of each list, and `sums` adds these.

In both, the first of two warpgroups computes probabilities and the second the gradients for them, and they swap the two through shared
memory; then each sums half of the columns, [64, 320] or [64, 256] float32 in registers.
"""

from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.launch import COLUMN, MATRIX, ROW, check_wgmma, kernel, layout, shared
from pallas_kernels.gpu.products import numbers, plus_products, spread, times_transposed, zeros
from pallas_kernels.gpu.warpgroups import SLOTS, USERS, bring, divide, meet, use
from pallas_kernels.sparse_attention.gpu.tiles import LOG2_E, ROWS, Source, inputs_of

Array = jax.Array
Span = tuple[Array, Array] | None

PASSING = 32  # rows of what passes by
SWIZZLE = 64  # bytes: the rows that pass by are contracted over, and Mosaic contracts as many elements at a time as the swizzle has
WIDEST = 256  # columns of one wgmma


def halves(rank: int, columns: int) -> list[list[tuple[int, int]]]:
    """Where each warpgroup's columns begin and end: in blocks of 64, none across `rank`."""
    middle = -(-columns // 64 // 2) * 64
    cuts = sorted({0, columns, rank, middle, *range(0, middle, WIDEST), *range(middle, columns, WIDEST)})
    pieces = list(pairwise(cuts))
    return [[piece for piece in pieces if (piece[0] >= middle) == second] for second in (False, True)]


def gradient_of_queries(
    q: Array, latent: Array, index: Array, count: Array, span: Span, log_total: Array, own: Array, d_o: Array, scale: float, interpret: bool
) -> Array:
    """d_q [B, C, H, K+R]; the arguments are those of `xla.attend_pages_backward`, or without a span of `xla.attend_tokens_backward`."""
    check_wgmma(interpret)
    batch, queries, heads, columns = q.shape
    rank = d_o.shape[-1]
    inputs = _rows(q, d_o, log_total, own) | inputs_of(latent, index, count, span)
    outputs = {"d_q": jax.ShapeDtypeStruct((batch * queries * heads, columns), q.dtype)}

    def body(refs, q_s, d_o_s, vectors, tiles, p_s, d_p_s, full, empty, arrived, met):
        first_row = jax.lax.axis_index("group") * ROWS
        rows, query = pl.ds(first_row, ROWS), first_row // heads
        source = _source(refs, inputs, q, index, PASSING, span, interpret)
        chosen = source.list_of(query)

        def bringer():
            for name, to in {"q": q_s, "d_o": d_o_s, "log_total": vectors.at[0], "own": vectors.at[1]}.items():
                plgpu.copy_gmem_to_smem(refs[name].at[rows], to, arrived)
            bring(
                source.tiles(chosen),
                lambda step, slot, barrier: source.start_copy(chosen, step, tiles.at[slot], barrier),
                full,
                empty,
                None if source.pages else source.arrive,
            )

        def user(who: int) -> None:
            plgpu.barrier_wait(arrived)
            vector = layout(vectors[who], COLUMN, interpret)

            def step(index, slot, sums):
                tile = tiles.at[slot]
                if who == 0:
                    logits = times_transposed([(q_s, tile)], interpret) * (scale * LOG2_E) - spread(vector, PASSING)
                    made = jnp.where(source.seen(query, index, numbers(PASSING, 1, interpret)), jnp.exp2(logits), 0.0)
                else:
                    made = times_transposed([(d_o_s, tile.at[:, pl.ds(0, rank)])], interpret) - spread(vector, PASSING)
                p, d_p = _swapped(who, made, p_s, d_p_s, met, interpret)
                d_logits = (p * d_p * scale).astype(q.dtype)
                return plus_products(sums, [[(d_logits, tile.at[:, _between(piece)])] for piece in pieces[who]], interpret)

            zero = [zeros(end - start, interpret) for start, end in pieces[who]]
            sums = use(source.tiles(chosen), step, zero, full, empty)
            meet(met)  # the queries are not read any more
            for piece, total in zip(pieces[who], sums):
                q_s[:, _between(piece)] = total.astype(q.dtype)
            plgpu.commit_smem()
            meet(met)
            if who == 0:
                plgpu.copy_smem_to_gmem(q_s, refs["d_q"].at[rows])
                plgpu.wait_smem_to_gmem(0)

        divide(bringer, [partial(user, who) for who in range(USERS)])

    pieces = halves(rank, columns)
    memory = (
        shared((ROWS, columns), q.dtype, SWIZZLE),
        shared((ROWS, rank), q.dtype, SWIZZLE),
        plgpu.SMEM((2, ROWS), jnp.float32),
        shared((SLOTS, PASSING, columns), q.dtype, SWIZZLE),
        *_exchange(arrivals=4),
    )
    grid = {"group": batch * queries * heads // ROWS}
    return kernel(body, inputs, outputs, grid, interpret=interpret, scratch=memory, warpgroups=USERS + 1)["d_q"].reshape(q.shape)


def gradient_of_latents(
    q: Array, latent: Array, index: Array, count: Array, span: Span, log_total: Array, own: Array, d_o: Array, scale: float, interpret: bool
) -> Array:
    """Every list's share of the gradient: [B, lists, tiles of 64, 64, K+R] float32, undefined in tiles beyond the list's end."""
    check_wgmma(interpret)
    batch, queries, heads, columns = q.shape
    rank = d_o.shape[-1]
    inputs = _rows(q, d_o, log_total, own) | inputs_of(latent, index, count, span)
    lists, block = index.shape[1], queries // index.shape[1]
    tiles = inputs["index"].shape[1] // (1 if span is not None else ROWS)
    outputs = {"shares": jax.ShapeDtypeStruct((batch * lists, tiles, ROWS, columns), jnp.float32)}
    steps = block * heads // PASSING

    def body(refs, tile_s, q_s, d_o_s, vectors, p_s, d_p_s, full, empty, arrived, met):
        share = jax.lax.axis_index("share")
        chosen, tile = share // tiles, jax.lax.rem(share, jnp.int32(tiles))
        source = _source(refs, inputs, q, index, ROWS, span, interpret)
        begin = chosen * (block * heads)

        def bringer():
            source.start_copy(chosen, tile, tile_s, arrived)
            source.arrive(0, arrived)

            def fetch(step, slot, barrier):
                rows = pl.ds(begin + step * PASSING, PASSING)
                for name, to in {"q": q_s, "d_o": d_o_s, "log_total": vectors.at[0], "own": vectors.at[1]}.items():
                    plgpu.copy_gmem_to_smem(refs[name].at[rows], to.at[slot], barrier)

            bring(steps, fetch, full, empty)

        def user(who: int) -> None:
            plgpu.barrier_wait(arrived)

            def step(index, slot, sums):
                vector = layout(vectors[who, slot], ROW, interpret)
                query = (begin + index * PASSING) // heads
                if who == 0:
                    logits = times_transposed([(tile_s, q_s.at[slot])], interpret) * (scale * LOG2_E) - spread(vector, PASSING, 1)
                    made = jnp.where(source.seen(query, tile, numbers(PASSING, 0, interpret)), jnp.exp2(logits), 0.0)
                else:
                    made = times_transposed([(tile_s.at[:, pl.ds(0, rank)], d_o_s.at[slot])], interpret) - spread(vector, PASSING, 1)
                p, d_p = _swapped(who, made, p_s, d_p_s, met, interpret)
                d_logits, p = (p * d_p * scale).astype(q.dtype), p.astype(q.dtype)
                terms = []
                for piece in pieces[who]:
                    terms.append([(d_logits, q_s.at[slot, :, _between(piece)])])
                    if piece[0] < rank:
                        terms[-1].append((p, d_o_s.at[slot, :, _between(piece)]))
                return plus_products(sums, terms, interpret)

            sums = use(steps, step, [zeros(end - start, interpret) for start, end in pieces[who]], full, empty)
            for piece, total in zip(pieces[who], sums):
                refs["shares"][chosen, tile, :, _between(piece)] = total

        @pl.when(tile < source.tiles(chosen))
        def _():
            divide(bringer, [partial(user, who) for who in range(USERS)])

    pieces = halves(rank, columns)
    memory = (
        shared((ROWS, columns), q.dtype, SWIZZLE),
        shared((SLOTS, PASSING, columns), q.dtype, SWIZZLE),
        shared((SLOTS, PASSING, rank), q.dtype, SWIZZLE),
        plgpu.SMEM((2, SLOTS, PASSING), jnp.float32),
        *_exchange(arrivals=1, copies=4),
    )
    grid = {"share": batch * lists * tiles}
    shares = kernel(body, inputs, outputs, grid, interpret=interpret, scratch=memory, warpgroups=USERS + 1)["shares"]
    return shares.reshape(batch, lists, tiles, ROWS, columns)


def _rows(q: Array, d_o: Array, log_total: Array, own: Array) -> dict[str, Array]:
    """One row for each query and head; the logarithm to the base 2."""
    return {
        "q": q.reshape(-1, q.shape[-1]),
        "d_o": d_o.reshape(-1, d_o.shape[-1]),
        "log_total": log_total.reshape(-1) * LOG2_E,
        "own": own.reshape(-1),
    }


def _source(refs: dict[str, Any], inputs: dict[str, Array], q: Array, index: Array, size: int, span: Span, interpret: bool) -> Source:
    batch, queries = q.shape[:2]
    return Source(refs, inputs["latent"].shape[0] // batch, queries, queries // index.shape[1], size, span is not None, SWIZZLE, interpret)


def _exchange(arrivals: int, copies: int = 1) -> tuple[Any, ...]:
    """Scratch: probabilities, gradients for them, full, empty, arrived, met."""
    return (
        *[shared((ROWS, PASSING), jnp.float32)] * 2,
        plgpu.Barrier(num_arrivals=copies, num_barriers=SLOTS),
        plgpu.Barrier(num_arrivals=USERS, num_barriers=SLOTS),
        plgpu.Barrier(num_arrivals=arrivals),
        plgpu.Barrier(num_arrivals=USERS),
    )


def _swapped(who: int, made: Array, p_s: Any, d_p_s: Any, met: Any, interpret: bool) -> tuple[Array, Array]:
    """What the two warpgroups made, known to both."""
    mine, other = (p_s, d_p_s) if who == 0 else (d_p_s, p_s)
    mine[...] = made
    meet(met)
    got = layout(other[...], MATRIX, interpret)
    meet(met)
    return (made, got) if who == 0 else (got, made)


def _between(piece: tuple[int, int]) -> Any:
    return pl.ds(piece[0], piece[1] - piece[0])
