"""Dense attention on Hopper, forward: one program for 128 queries of a head, past which keys and values come, 128 at a time.

Two warpgroups have 64 queries each and take turns: while one multiplies, the other computes its softmax (arXiv 2407.08608, section 3.1).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.gpu.walk import TILE, Walk, filled, filled_first, keys_of_queries
from pallas_kernels.attention.spec import Attended
from pallas_kernels.gpu.launch import COLUMN, WARPGROUP, check_wgmma, kernel, layout, shared
from pallas_kernels.gpu.products import numbers, plus_products, spread, times_transposed, zeros
from pallas_kernels.gpu.warpgroups import USERS, Stream, bring_streams, divide, meet, release

Array = jax.Array

LOG2_E = 1.4426950408889634
ROWS = TILE // USERS  # queries of a warpgroup: the rows of a wgmma
KEYS = 128  # that pass by at a time
SLOTS = 2


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
    interpret: bool = False,
) -> Attended:
    """Shapes as in `api.dense_attention` and `gpu.misfit`. `query_block` is for XLA."""
    check_wgmma(interpret)
    batch, heads, length, width = q_nope.shape
    rope, out_width, dtype = q_rope.shape[3], value.shape[3], q_nope.dtype
    first = filled_first(first)
    padded = first.shape[1]
    tiles = padded // TILE
    named = {"q_nope": q_nope, "q_rope": q_rope, "k_nope": k_nope, "k_rope": k_rope, "value": value}
    inputs = {name: filled(x, -2).reshape(-1, x.shape[-1]) for name, x in named.items()}
    inputs |= {"first": first.reshape(-1), "walk": keys_of_queries(first, KEYS)}
    rows = batch * heads * padded
    outputs = {
        "out": jax.ShapeDtypeStruct((rows, out_width), dtype),
        "log_total": jax.ShapeDtypeStruct((rows,), jnp.float32),
        "top": jax.ShapeDtypeStruct((rows,), jnp.float32),
    }
    factor = scale * LOG2_E

    def body(refs, q_nope_s, q_rope_s, first_s, k_nope_s, k_rope_s, value_s, k_full, k_empty, v_full, v_empty, arrived, turn):
        # One head after another, so that its keys stay in the second-level cache; long rows of tiles first.
        program = jax.lax.axis_index("tile")
        head, own = program // tiles, tiles - 1 - jax.lax.rem(program, jnp.int32(tiles))
        sequence = head // heads
        walk = Walk.read(refs["walk"], sequence * tiles + own, own, KEYS)

        def bringer():
            for who in range(USERS):
                start = own * TILE + who * ROWS
                plgpu.copy_gmem_to_smem(refs["q_nope"].at[pl.ds(head * padded + start, ROWS)], q_nope_s.at[who], arrived)
                plgpu.copy_gmem_to_smem(refs["q_rope"].at[pl.ds(head * padded + start, ROWS)], q_rope_s.at[who], arrived)
                plgpu.copy_gmem_to_smem(refs["first"].at[pl.ds(sequence * padded + start, ROWS)], first_s.at[who], arrived)

            def keys(step, slot, barrier):
                start = walk.start(step)
                plgpu.copy_gmem_to_smem(refs["k_nope"].at[pl.ds(head * padded + start, KEYS)], k_nope_s.at[slot], barrier)
                plgpu.copy_gmem_to_smem(refs["k_rope"].at[pl.ds(sequence * padded + start, KEYS)], k_rope_s.at[slot], barrier)

            def values(step, slot, barrier):
                plgpu.copy_gmem_to_smem(refs["value"].at[pl.ds(head * padded + walk.start(step), KEYS)], value_s.at[slot], barrier)

            bring_streams(walk.steps, [Stream(keys, k_full, k_empty), Stream(values, v_full, v_empty)], SLOTS)

        def user():
            who = jax.lax.axis_index(WARPGROUP)
            begin = own * TILE + who * ROWS

            def vector(value):
                return layout(jnp.full((ROWS,), value, jnp.float32), COLUMN, interpret)

            def step(masked, index, carry):
                sums, top, total = carry
                slot = jax.lax.rem(index, jnp.int32(SLOTS))
                plgpu.barrier_wait(k_full.at[slot])
                pairs = [(q_nope_s.at[who], k_nope_s.at[slot]), (q_rope_s.at[who], k_rope_s.at[slot])]
                dots = times_transposed(pairs, interpret, lambda: meet(turn))
                release(k_empty.at[slot], interpret)
                # A positive factor can be applied in the same instruction as the difference, and after the maximum.
                dots, by = (dots, factor) if factor > 0 else (dots * factor, 1.0)
                if masked:
                    key, query = numbers(KEYS, 1, interpret) + walk.start(index), numbers(KEYS, 0, interpret) + begin
                    dots = jnp.where((key <= query) & (key >= spread(first, KEYS)), dots, -jnp.inf)
                higher = jnp.maximum(top, jnp.max(dots, axis=1) * by)
                p = jnp.exp2(dots * by - spread(higher, KEYS))
                shrink = jnp.exp2(top - higher)
                total = total * shrink + jnp.sum(p, axis=1)
                sums, p = sums * spread(shrink, out_width), p.astype(dtype)
                sums, higher, total, p = jax.lax.optimization_barrier((sums, higher, total, p))  # before the other's turn
                meet(turn)
                plgpu.barrier_wait(v_full.at[slot])
                [sums] = plus_products([sums], [[(p, value_s.at[slot])]], interpret)
                release(v_empty.at[slot], interpret)
                return sums, higher, total

            plgpu.barrier_wait(arrived)
            first = layout(first_s[who], COLUMN, interpret)
            pl.when(who == 1)(lambda: meet(turn))  # half a step behind
            carry = zeros(out_width, interpret), vector(-jnp.inf), vector(0.0)
            carry = jax.lax.fori_loop(0, walk.masked, partial(step, True), carry)
            sums, top, total = jax.lax.fori_loop(walk.masked, walk.steps, partial(step, False), carry)
            pl.when(who == 0)(lambda: meet(turn))
            rows = pl.ds(head * padded + begin, ROWS)
            q_nope_s.at[who][...] = (sums * spread(1.0 / total, out_width)).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_nope_s.at[who], refs["out"].at[rows])
            highest = top * (1 / LOG2_E)
            refs["top"][rows] = highest
            refs["log_total"][rows] = highest + jnp.log(total)
            plgpu.wait_smem_to_gmem(0)

        divide(bringer, [user])

    memory = (
        shared((USERS, ROWS, width), dtype),
        shared((USERS, ROWS, rope), dtype),
        plgpu.SMEM((USERS, ROWS), jnp.int32),
        shared((SLOTS, KEYS, width), dtype),
        shared((SLOTS, KEYS, rope), dtype),
        shared((SLOTS, KEYS, out_width), dtype),
        plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),
        plgpu.Barrier(num_arrivals=USERS, num_barriers=SLOTS),
        plgpu.Barrier(num_arrivals=1, num_barriers=SLOTS),
        plgpu.Barrier(num_arrivals=USERS, num_barriers=SLOTS),
        plgpu.Barrier(num_arrivals=3 * USERS),
        plgpu.Barrier(num_arrivals=USERS),
    )
    grid = {"tile": batch * heads * tiles}
    found = kernel(body, inputs, outputs, grid, interpret=interpret, scratch=memory, warpgroups=USERS + 1, approximate=True)
    shape = (batch, heads, padded)
    out, log_total, top = (found[name].reshape(*shape, *found[name].shape[1:])[:, :, :length] for name in ("out", "log_total", "top"))
    return Attended(out, log_total, top)
