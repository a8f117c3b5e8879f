"""The kernel that attends to selected latents, forward: one program for each query and 64 of its heads.

Two warpgroups have half of the latent's columns each, [64 heads, 256] float32 in registers, which is as much as a thread can hold; both
compute the same scores and softmax. That is 1.53 times the products that are needed, but neither waits for the other.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.launch import COLUMN, WARPGROUP, check_wgmma, kernel, layout, shared
from pallas_kernels.gpu.products import numbers, plus_products, spread, times_transposed, zeros
from pallas_kernels.gpu.warpgroups import SLOTS, USERS, bring, divide, meet, use
from pallas_kernels.sparse_attention.gpu.tiles import LOG2_E, ROWS, Source, inputs_of
from pallas_kernels.sparse_attention.spec import NO_KEYS

Array = jax.Array
SWIZZLE = 128


def attend(
    q: Array, latent: Array, index: Array, count: Array, span: tuple[Array, Array] | None, rank: int, scale: float, interpret: bool
) -> tuple[Array, Array, Array]:
    """As `xla.attend_pages` with the span, first and stop, and as `xla.attend_tokens` without."""
    check_wgmma(interpret)
    batch, queries, heads, columns = q.shape
    inputs = {"q": q.reshape(-1, columns), **inputs_of(latent, index, count, span)}
    block, half, rotated = queries // index.shape[1], rank // USERS, columns - rank
    outputs = {
        "o": jax.ShapeDtypeStruct((batch * queries * heads, rank), q.dtype),
        "log_total": jax.ShapeDtypeStruct((batch * queries * heads,), jnp.float32),
        "top": jax.ShapeDtypeStruct((batch * queries * heads,), jnp.float32),
    }

    def body(refs, latent_q, rotated_q, tiles, full, empty, arrived, done):
        first_row = jax.lax.axis_index("group") * ROWS
        rows, query = pl.ds(first_row, ROWS), first_row // heads
        source = Source(refs, inputs["latent"].shape[0] // batch, queries, block, ROWS, span is not None, SWIZZLE, interpret)
        chosen = source.list_of(query)
        parts = [(pl.ds(i * half, half), latent_q.at[i]) for i in range(USERS)] + [(pl.ds(rank, rotated), rotated_q)]

        def bringer():
            for start, part in parts:
                plgpu.copy_gmem_to_smem(refs["q"].at[rows, start], part, arrived)
            bring(
                source.tiles(chosen),
                lambda step, slot, barrier: source.start_copy(chosen, step, tiles.at[slot], barrier),
                full,
                empty,
                None if source.pages else source.arrive,
            )

        def user():
            who = jax.lax.axis_index(WARPGROUP)
            own = pl.ds(who * half, half)

            def vector(value):
                return layout(jnp.full((ROWS,), value, jnp.float32), COLUMN, interpret)

            def step(index, slot, carry):
                o, top, total = carry
                tile = tiles.at[slot]
                logits = times_transposed([(part, tile.at[:, start]) for start, part in parts], interpret) * (scale * LOG2_E)
                logits = jnp.where(source.seen(query, index, numbers(ROWS, 1, interpret)), logits, -jnp.inf)
                higher = jnp.maximum(top, jnp.max(logits, axis=1))
                p = jnp.exp2(logits - spread(higher, ROWS))
                shrink = jnp.exp2(top - higher)
                total = total * shrink + jnp.sum(p, axis=1)
                [o] = plus_products([o * spread(shrink, half)], [[(p.astype(q.dtype), tile.at[:, own])]], interpret)
                return o, higher, total

            plgpu.barrier_wait(arrived)
            zero = zeros(half, interpret), vector(NO_KEYS), vector(0.0)
            o, top, total = use(source.tiles(chosen), step, zero, full, empty)
            some = total > 0.0
            total = jnp.where(some, total, 1.0)
            meet(done)  # the queries are not read any more
            latent_q.at[who][...] = (o * spread(1.0 / total, half)).astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(latent_q.at[who], refs["o"].at[rows, own])
            plgpu.wait_smem_to_gmem(0)

            @pl.when(who == 0)
            def _():
                highest = jnp.where(some, top * (1 / LOG2_E), NO_KEYS)
                refs["top"][rows] = highest
                refs["log_total"][rows] = highest + jnp.log(total)

        divide(bringer, [user])

    memory = (
        shared((USERS, ROWS, half), q.dtype),
        shared((ROWS, rotated), q.dtype),
        shared((SLOTS, ROWS, columns), q.dtype),
        plgpu.Barrier(num_barriers=SLOTS),
        plgpu.Barrier(num_arrivals=USERS, num_barriers=SLOTS),
        plgpu.Barrier(num_arrivals=USERS + 1),
        plgpu.Barrier(num_arrivals=USERS),
    )
    grid = {"group": batch * queries * heads // ROWS}
    out = kernel(body, inputs, outputs, grid, interpret=interpret, scratch=memory, warpgroups=USERS + 1)
    shape = (batch, queries, heads)
    return out["o"].reshape(*shape, rank), out["log_total"].reshape(shape), out["top"].reshape(shape)
