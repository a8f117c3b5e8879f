"""The kernel that attends to selected latents, forward: one program for each query and 64 of its heads.

Two warpgroups have half of the latent's columns each, [64 heads, 256] float32 in registers, which is as much as a thread can hold; both
compute the same scores and softmax. That is 1.53 times the products that are needed, but they never wait for each other. A third brings
tiles.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.launch import COLUMN, WARPGROUP, check_wgmma, kernel, layout, shared
from pallas_kernels.gpu.products import by_row, plus_product, times_transposed, zeros
from pallas_kernels.sparse_attention.gpu.tiles import ROWS, Source, padded, scratch

USERS = 2  # warpgroups that multiply
LOG2_E = math.log2(math.e)
FLOOR = -1e30  # the largest logit where there is none


def attend(
    q: jax.Array,
    latent: jax.Array,
    selected: dict[str, jax.Array],
    latent_width: int,
    scale: float,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries q [B, C, H, K+R] over latents [B, T, K+R] -> o [B, C, H, K], log_total and top [B, C, H] float32.

    Args:
      selected: of tokens, index [B, C, k] and count [B, C]; of pages, index [B, C/64, p] and count, and first and stop [B, C].
      latent_width: K.
    """
    check_wgmma(interpret)
    batch, queries, heads, columns = q.shape
    pages = "first" in selected
    latent = padded(latent, 1)
    keys, groups, half = latent.shape[1], heads // ROWS, latent_width // USERS
    index = selected["index"] if pages else padded(selected["index"], 2)
    inputs = {
        "q": q.reshape(-1, columns),
        "latent": latent.reshape(-1, columns),
        "index": index.reshape(-1, index.shape[-1]),
        **{name: value.reshape(-1) for name, value in selected.items() if name != "index"},
    }
    rows = batch * queries * heads
    outputs = {
        "o": jax.ShapeDtypeStruct((rows, latent_width), q.dtype),
        "log_total": jax.ShapeDtypeStruct((rows,), jnp.float32),
        "top": jax.ShapeDtypeStruct((rows,), jnp.float32),
    }

    def body(refs, latent_q, rotated_q, tiles, full, empty, arrived, done):
        sequence, at, group = (jax.lax.axis_index(name) for name in ("batch", "query", "group"))
        query = sequence * queries + at
        row = query * heads + group * ROWS
        source = Source(refs, query, sequence * keys, keys, pages, interpret)
        who = jax.lax.axis_index(WARPGROUP)
        parts = [(pl.ds(i * half, half), latent_q.at[i]) for i in range(USERS)]
        parts.append((pl.ds(latent_width, columns - latent_width), rotated_q))

        @pl.when(who == USERS)
        def _():
            plgpu.set_max_registers(24, action="decrease")
            for start, part in parts:
                plgpu.copy_gmem_to_smem(refs["q"].at[pl.ds(row, ROWS), start], part, arrived)
            source.bring(tiles, full, empty)

        @pl.when(who < USERS)
        def _():
            plgpu.set_max_registers(240, action="increase")
            own = pl.ds(who * half, half)

            def vector(value):
                return layout(jnp.full((ROWS,), value, jnp.float32), COLUMN, interpret)

            def step(index, tile, carry):
                o, top, total = carry
                logits = times_transposed([(part, tile.at[:, start]) for start, part in parts], interpret) * (scale * LOG2_E)
                logits = jnp.where(source.seen(index), logits, -jnp.inf)
                higher = jnp.maximum(top, jnp.max(logits, axis=1))
                p = jnp.exp2(logits - by_row(higher, ROWS))
                shrink = jnp.exp2(top - higher)
                total = total * shrink + jnp.sum(p, axis=1)
                o = plus_product(o * by_row(shrink, half), p.astype(q.dtype), tile.at[:, own], interpret)
                return o, higher, total

            plgpu.barrier_wait(arrived)
            o, top, total = source.use(step, (zeros(half, interpret), vector(FLOOR), vector(0.0)), tiles, full, empty)
            weight = 1.0 / jnp.where(total > 0.0, total, 1.0)
            plgpu.barrier_arrive(done)
            plgpu.barrier_wait(done)  # the queries are not read any more
            latent_q.at[who][...] = (o * by_row(weight, half)).astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(latent_q.at[who], refs["o"].at[pl.ds(row, ROWS), own])
            plgpu.wait_smem_to_gmem(0)

            @pl.when(who == 0)
            def _():
                natural = jnp.where(total > 0.0, top * (1 / LOG2_E), FLOOR)
                refs["top"][pl.ds(row, ROWS)] = natural
                refs["log_total"][pl.ds(row, ROWS)] = jnp.where(total > 0.0, natural + jnp.log(jnp.where(total > 0.0, total, 1.0)), FLOOR)

    memory = (
        shared((USERS, ROWS, half), q.dtype),
        shared((ROWS, columns - latent_width), q.dtype),
        *scratch(columns, q.dtype, USERS),
        plgpu.Barrier(num_arrivals=USERS + 1),
        plgpu.Barrier(num_arrivals=USERS),
    )
    grid = {"batch": batch, "query": queries, "group": groups}
    out = kernel(body, inputs, outputs, grid, interpret=interpret, scratch=memory, warpgroups=USERS + 1)
    shape = (batch, queries, heads)
    return out["o"].reshape(*shape, latent_width), out["log_total"].reshape(shape), out["top"].reshape(shape)
