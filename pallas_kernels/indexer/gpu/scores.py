"""The kernel that scores 64 queries and 256 keys: all heads, one after another, are added up in registers.

Two warpgroups have 128 keys each; the queries' heads pass by. Tiles that no query sees are not computed.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.launch import COLUMN, WARPGROUP, check_wgmma, kernel, layout, shared
from pallas_kernels.gpu.products import numbers, spread, times_transposed, zeros
from pallas_kernels.gpu.warpgroups import SLOTS, USERS, bring, divide, use
from pallas_kernels.indexer.xla import masked
from pallas_kernels.visible import PAGE, Span

Array = jax.Array

QUERIES = 64  # of a tile: the rows of a wgmma
OWN = 128  # keys of a warpgroup
KEYS = USERS * OWN


def score(q: Array, k: Array, weight: Array, span: Span, pages: bool, interpret: bool) -> Array:
    """`xla.index_scores`, or with `pages` its largest for every query and page of keys: [B, ceil(T / PAGE), C]. q and k are bfloat16."""
    check_wgmma(interpret)
    (batch, length, heads, size), keys = q.shape, k.shape[1]
    q, weight, first, stop = (_filled(x, QUERIES) for x in (q, weight.astype(jnp.float32), *span))
    k = _filled(k, KEYS)
    rows, columns = q.shape[1] // QUERIES, k.shape[1] // KEYS  # tiles
    by_tile = first.reshape(-1, QUERIES), stop.reshape(-1, QUERIES)
    some = by_tile[1] > by_tile[0]
    inputs = {
        "q": q.reshape(-1, heads * size),
        "k": k.reshape(-1, size),
        "weight": weight.swapaxes(1, 2).reshape(batch * heads, -1),
        "spans": jnp.stack(by_tile, axis=1),
        "lowest": jnp.min(jnp.where(some, by_tile[0], keys), axis=1),
        "end": jnp.max(jnp.where(some, by_tile[1], 0), axis=1),
    }
    shape = (batch * columns * KEYS // PAGE, rows * QUERIES) if pages else (batch * rows * QUERIES, columns * KEYS)
    outputs = {"scores": jax.ShapeDtypeStruct(shape, jnp.float32)}
    width = PAGE if pages else OWN  # keys of one product

    def body(refs, q_s, k_s, weight_s, spans_s, full, empty, arrived):
        number = jax.lax.axis_index("tile")
        of_queries, column = number // columns, jax.lax.rem(number, jnp.int32(columns))
        sequence, row = of_queries // rows, jax.lax.rem(of_queries, jnp.int32(rows))
        begin = column * KEYS
        seen = (refs["end"][of_queries] > begin) & (refs["lowest"][of_queries] < begin + KEYS)
        steps = jnp.where(seen, heads, 0)

        def bringer():
            for i in range(USERS):
                plgpu.copy_gmem_to_smem(refs["k"].at[pl.ds(sequence * columns * KEYS + begin + i * OWN, OWN)], k_s.at[i], arrived)
            plgpu.copy_gmem_to_smem(refs["spans"].at[of_queries], spans_s, arrived)

            def fetch(step, slot, barrier):
                place = pl.ds(of_queries * QUERIES, QUERIES), pl.ds(step * size, size)
                plgpu.copy_gmem_to_smem(refs["q"].at[place], q_s.at[slot], barrier)
                of_head = refs["weight"].at[sequence * heads + step, pl.ds(row * QUERIES, QUERIES)]
                plgpu.copy_gmem_to_smem(of_head, weight_s.at[slot], barrier)

            bring(steps, fetch, full, empty)

        def user():
            who = jax.lax.axis_index(WARPGROUP)
            plgpu.barrier_wait(arrived)

            def step(_, slot, totals):
                weight = spread(layout(weight_s[slot], COLUMN, interpret), width)
                dots = [times_transposed([(q_s.at[slot], k_s.at[who, pl.ds(i * width, width)])], interpret) for i in range(len(totals))]
                return [total + jnp.maximum(dot, 0.0) * weight for total, dot in zip(totals, dots)]

            totals = use(steps, step, [zeros(width, interpret) for _ in range(OWN // width)], full, empty)
            first, stop = (spread(layout(spans_s[i], COLUMN, interpret), width) for i in range(2))
            for i, total in enumerate(totals):
                start = begin + who * OWN + i * width
                key = numbers(width, 1, interpret) + start
                found = masked(total, (key >= first) & (key < stop))
                if pages:
                    page = (sequence * columns * KEYS + start) // PAGE
                    refs["scores"][page, pl.ds(row * QUERIES, QUERIES)] = jnp.max(found, axis=1)
                else:
                    refs["scores"][pl.ds(of_queries * QUERIES, QUERIES), pl.ds(start, width)] = found

        divide(bringer, [user])

    memory = (
        shared((SLOTS, QUERIES, size), q.dtype),
        shared((USERS, OWN, size), q.dtype),
        plgpu.SMEM((SLOTS, QUERIES), jnp.float32),
        plgpu.SMEM((2, QUERIES), jnp.int32),
        plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),
        plgpu.Barrier(num_arrivals=USERS, num_barriers=SLOTS),
        plgpu.Barrier(num_arrivals=USERS + 1),
    )
    grid = {"tile": batch * rows * columns}
    scores = kernel(body, inputs, outputs, grid, interpret=interpret, scratch=memory, warpgroups=USERS + 1)["scores"]
    if pages:
        return scores.reshape(batch, -1, rows * QUERIES)[:, : -(-keys // PAGE), :length]
    return scores.reshape(batch, rows * QUERIES, -1)[:, :length, :keys]


def _filled(x: Array, multiple: int) -> Array:
    """Axis 1 filled with zeros to a multiple."""
    missing = -x.shape[1] % multiple
    return jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2))) if missing else x
