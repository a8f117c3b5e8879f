"""Dense attention on Hopper, backward: two kernels, which both compute the logits again. No atomics: all sums have a fixed order.

gradient_of_queries: one program for 128 queries of a head; keys and values pass by, 64 at a time.
gradient_of_keys: one program for 128 keys of some heads, one head after another; queries pass by, 32 at a time. The rotated key's gradient
is summed over the program's heads in registers.

In both, two warpgroups have 64 rows each and need nothing from each other.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.gpu.forward import LOG2_E, ROWS
from pallas_kernels.attention.gpu.walk import TILE, Walk, ends, filled, filled_first, keys_of_queries, queries_of_keys
from pallas_kernels.gpu.launch import COLUMN, MULTIPROCESSORS, ROW, WARPGROUP, check_wgmma, kernel, layout, shared
from pallas_kernels.gpu.products import numbers, plus_products, spread, times_transposed, zeros
from pallas_kernels.gpu.warpgroups import USERS, Stream, bring_streams, divide, release

Array = jax.Array
Inputs = dict[str, Array]

KEYS, KEY_SLOTS = 64, 3  # that pass by the queries
QUERIES, QUERY_SLOTS = 32, 4  # that pass by the keys
SWIZZLE = 64  # bytes, where queries pass by: they are contracted over, and Mosaic contracts as many elements at a time as the swizzle has
MOST_HEADS = 8  # of a program that owns keys


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
    interpret: bool = False,
) -> tuple[Array, Array, Array, Array, Array]:
    """Gradients for q_nope, q_rope, k_nope, k_rope and value. Shapes as in `api.dense_attention`; `query_block` is for XLA."""
    check_wgmma(interpret)
    batch, heads, length, _ = q_nope.shape
    own = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1)
    arrays = {"q_nope": q_nope, "q_rope": q_rope, "k_nope": k_nope, "k_rope": k_rope, "value": value, "d_out": d_out}
    inputs = {name: filled(x, -2).reshape(-1, x.shape[-1]) for name, x in arrays.items()}
    inputs |= {"log_total": filled(log_total * LOG2_E, 2).reshape(-1), "own": filled(own, 2).reshape(-1)}
    first = filled_first(first)
    d_q_nope, d_q_rope = _gradient_of_queries(inputs, first, heads, scale, interpret)
    d_k_nope, d_k_rope, d_value = _gradient_of_keys(inputs, first, heads, scale, interpret)

    def whole(x: Array) -> Array:
        return x.reshape(batch, heads, -1, x.shape[-1])[:, :, :length]

    d_k_rope = d_k_rope.sum(axis=1)[:, :length].astype(k_rope.dtype)
    return whole(d_q_nope), whole(d_q_rope), whole(d_k_nope), d_k_rope, whole(d_value)


def heads_of_a_program(batch: int, heads: int, tiles: int) -> int:
    """Heads that a program which owns keys has: as many as leave every multiprocessor four programs."""
    fitting = [n for n in range(1, MOST_HEADS + 1) if heads % n == 0 and batch * tiles * heads // n >= 4 * MULTIPROCESSORS]
    return max(fitting, default=1)


def _gradient_of_queries(inputs: Inputs, first: Array, heads: int, scale: float, interpret: bool) -> tuple[Array, Array]:
    """d_q_nope [B * H * S, D] and d_q_rope [B * H * S, R]."""
    batch, length = first.shape
    tiles, dtype = length // TILE, inputs["q_nope"].dtype
    widths = {name: x.shape[1] for name, x in inputs.items() if x.ndim == 2}
    inputs = inputs | {"first": first.reshape(-1), "walk": keys_of_queries(first, KEYS)}
    outputs = {f"d_{name}": jax.ShapeDtypeStruct(inputs[name].shape, dtype) for name in ("q_nope", "q_rope")}

    def body(refs, q_nope_s, q_rope_s, d_out_s, log_total_s, own_s, first_s, k_nope_s, k_rope_s, value_s, full, empty, arrived):
        program = jax.lax.axis_index("tile")
        head, own_tile = program // tiles, tiles - 1 - jax.lax.rem(program, jnp.int32(tiles))
        sequence = head // heads
        walk = Walk.read(refs["walk"], sequence * tiles + own_tile, own_tile, KEYS)

        def bringer():
            buffers = {"q_nope": q_nope_s, "q_rope": q_rope_s, "d_out": d_out_s, "log_total": log_total_s, "own": own_s, "first": first_s}
            for name, buffer in buffers.items():
                for who in range(USERS):
                    start = (sequence if name == "first" else head) * length + own_tile * TILE + who * ROWS
                    plgpu.copy_gmem_to_smem(refs[name].at[pl.ds(start, ROWS)], buffer.at[who], arrived)

            def fetch(step, slot, barrier):
                for name, buffer in {"k_nope": k_nope_s, "k_rope": k_rope_s, "value": value_s}.items():
                    start = (sequence if name == "k_rope" else head) * length + walk.start(step)
                    plgpu.copy_gmem_to_smem(refs[name].at[pl.ds(start, KEYS)], buffer.at[slot], barrier)

            bring_streams(walk.steps, [Stream(fetch, full, empty)], KEY_SLOTS)

        def user():
            who = jax.lax.axis_index(WARPGROUP)
            begin = own_tile * TILE + who * ROWS
            plgpu.barrier_wait(arrived)
            log_total, own, first = (layout(x[who], COLUMN, interpret) for x in (log_total_s, own_s, first_s))

            def step(masked, index, sums):
                slot = jax.lax.rem(index, jnp.int32(KEY_SLOTS))
                plgpu.barrier_wait(full.at[slot])
                k_nope, k_rope = k_nope_s.at[slot], k_rope_s.at[slot]
                dots = times_transposed([(q_nope_s.at[who], k_nope), (q_rope_s.at[who], k_rope)], interpret)
                p = jnp.exp2(dots * (scale * LOG2_E) - spread(log_total, KEYS))
                if masked:
                    key, query = numbers(KEYS, 1, interpret) + walk.start(index), numbers(KEYS, 0, interpret) + begin
                    p = jnp.where((key <= query) & (key >= spread(first, KEYS)), p, 0.0)
                d_p = times_transposed([(d_out_s.at[who], value_s.at[slot])], interpret) - spread(own, KEYS)
                d_logits = (p * d_p).astype(dtype)
                sums = plus_products(sums, [[(d_logits, k_nope)], [(d_logits, k_rope)]], interpret)
                release(empty.at[slot], interpret)
                return sums

            sums = [zeros(widths[name], interpret) for name in ("q_nope", "q_rope")]
            sums = jax.lax.fori_loop(0, walk.masked, partial(step, True), sums)
            sums = jax.lax.fori_loop(walk.masked, walk.steps, partial(step, False), sums)
            rows = pl.ds(head * length + begin, ROWS)
            _store(
                [(total * scale, buffer.at[who], refs[name].at[rows]) for total, buffer, name in zip(sums, (q_nope_s, q_rope_s), outputs)]
            )

        divide(bringer, [user])

    memory = (
        *[shared((USERS, ROWS, widths[name]), dtype) for name in ("q_nope", "q_rope", "d_out")],
        *[plgpu.SMEM((USERS, ROWS), kind) for kind in (jnp.float32, jnp.float32, jnp.int32)],
        *[shared((KEY_SLOTS, KEYS, widths[name]), dtype) for name in ("k_nope", "k_rope", "value")],
        plgpu.Barrier(num_arrivals=3, num_barriers=KEY_SLOTS),
        plgpu.Barrier(num_arrivals=USERS, num_barriers=KEY_SLOTS),
        plgpu.Barrier(num_arrivals=6 * USERS),
    )
    grid = {"tile": batch * heads * tiles}
    found = kernel(body, inputs, outputs, grid, interpret=interpret, scratch=memory, warpgroups=USERS + 1, approximate=True)
    return found["d_q_nope"], found["d_q_rope"]


def _gradient_of_keys(inputs: Inputs, first: Array, heads: int, scale: float, interpret: bool) -> tuple[Array, Array, Array]:
    """d_k_nope [B * H * S, D], a float32 share of d_k_rope for some heads each [B, shares, S, R], and d_value [B * H * S, V]."""
    batch, length = first.shape
    tiles, dtype = length // TILE, inputs["q_nope"].dtype
    together = heads_of_a_program(batch, heads, tiles)
    groups = heads // together
    widths = {name: x.shape[1] for name, x in inputs.items() if x.ndim == 2}
    end = ends(first)
    inputs = inputs | {"end": end.reshape(-1), "walk": queries_of_keys(end, QUERIES)}
    outputs = {
        "d_k_nope": jax.ShapeDtypeStruct(inputs["k_nope"].shape, dtype),
        "d_value": jax.ShapeDtypeStruct(inputs["value"].shape, dtype),
        "d_k_rope": jax.ShapeDtypeStruct((batch * groups * length, widths["k_rope"]), jnp.float32),
    }

    def body(refs, k_nope_s, k_rope_s, value_s, end_s, q_nope_s, q_rope_s, d_out_s, log_total_s, own_s, full, empty, arrived, ready, done):
        program = jax.lax.axis_index("tile")
        group, own_tile = program // tiles, jax.lax.rem(program, jnp.int32(tiles))
        sequence = group // groups
        walk = Walk.read(refs["walk"], sequence * tiles + own_tile, own_tile, QUERIES)

        def keys(number, who):
            """The rows of a warpgroup, in an array that has `length` for every head, sequence or group."""
            return pl.ds(number * length + own_tile * TILE + who * ROWS, ROWS)

        def bringer():
            for who in range(USERS):
                plgpu.copy_gmem_to_smem(refs["k_rope"].at[keys(sequence, who)], k_rope_s.at[who], arrived)
                plgpu.copy_gmem_to_smem(refs["end"].at[keys(sequence, who)], end_s.at[who], arrived)
            steps = walk.steps

            def fetch(index, slot, barrier):
                nth = index // steps
                head, step = group * together + nth, index - nth * steps

                @pl.when(step == 0)
                def _():
                    pl.when(nth > 0)(lambda: plgpu.barrier_wait(done))
                    for who in range(USERS):
                        plgpu.copy_gmem_to_smem(refs["k_nope"].at[keys(head, who)], k_nope_s.at[who], ready)
                        plgpu.copy_gmem_to_smem(refs["value"].at[keys(head, who)], value_s.at[who], ready)

                rows = pl.ds(head * length + walk.start(step), QUERIES)
                passing = {"q_nope": q_nope_s, "q_rope": q_rope_s, "d_out": d_out_s, "log_total": log_total_s, "own": own_s}
                for name, buffer in passing.items():
                    plgpu.copy_gmem_to_smem(refs[name].at[rows], buffer.at[slot], barrier)

            bring_streams(together * steps, [Stream(fetch, full, empty)], QUERY_SLOTS)
            plgpu.barrier_wait(done)

        def user():
            who = jax.lax.axis_index(WARPGROUP)
            begin = own_tile * TILE + who * ROWS
            plgpu.barrier_wait(arrived)
            end = layout(end_s[who], COLUMN, interpret)

            def step(masked, before, index, sums):
                slot = jax.lax.rem(before + index, jnp.int32(QUERY_SLOTS))
                plgpu.barrier_wait(full.at[slot])
                q_nope, q_rope, d_out = q_nope_s.at[slot], q_rope_s.at[slot], d_out_s.at[slot]

                def vector(buffer):
                    return spread(layout(buffer[slot], ROW, interpret), QUERIES, 1)

                dots = times_transposed([(k_nope_s.at[who], q_nope), (k_rope_s.at[who], q_rope)], interpret)
                p = jnp.exp2(dots * (scale * LOG2_E) - vector(log_total_s))
                if masked:
                    key, query = numbers(QUERIES, 0, interpret) + begin, numbers(QUERIES, 1, interpret) + walk.start(index)
                    p = jnp.where((key <= query) & (query < spread(end, QUERIES)), p, 0.0)
                d_p = times_transposed([(value_s.at[who], d_out)], interpret) - vector(own_s)
                d_logits, p = (p * d_p).astype(dtype), p.astype(dtype)
                sums = plus_products(sums, [[(d_logits, q_nope)], [(d_logits, q_rope)], [(p, d_out)]], interpret)
                release(empty.at[slot], interpret)
                return sums

            def of_head(nth, d_k_rope):
                plgpu.barrier_wait(ready)
                before = nth * walk.steps
                sums = [zeros(widths["k_nope"], interpret), d_k_rope, zeros(widths["value"], interpret)]
                sums = jax.lax.fori_loop(0, walk.masked, partial(step, True, before), sums)
                sums = jax.lax.fori_loop(walk.masked, walk.steps, partial(step, False, before), sums)
                d_k_nope, d_k_rope, d_value = sums
                rows = keys(group * together + nth, who)
                made = [
                    (d_k_nope * scale, k_nope_s.at[who], refs["d_k_nope"].at[rows]),
                    (d_value, value_s.at[who], refs["d_value"].at[rows]),
                ]
                _store(made)
                plgpu.barrier_arrive(done)
                return d_k_rope

            total = jax.lax.fori_loop(0, together, of_head, zeros(widths["k_rope"], interpret))
            refs["d_k_rope"][keys(group, who)] = total * scale

        divide(bringer, [user])

    memory = (
        *[shared((USERS, ROWS, widths[name]), dtype, SWIZZLE) for name in ("k_nope", "k_rope", "value")],
        plgpu.SMEM((USERS, ROWS), jnp.int32),
        *[shared((QUERY_SLOTS, QUERIES, widths[name]), dtype, SWIZZLE) for name in ("q_nope", "q_rope", "d_out")],
        *[plgpu.SMEM((QUERY_SLOTS, QUERIES), jnp.float32)] * 2,
        plgpu.Barrier(num_arrivals=5, num_barriers=QUERY_SLOTS),
        plgpu.Barrier(num_arrivals=USERS, num_barriers=QUERY_SLOTS),
        plgpu.Barrier(num_arrivals=2 * USERS),
        plgpu.Barrier(num_arrivals=2 * USERS),
        plgpu.Barrier(num_arrivals=USERS),
    )
    grid = {"tile": batch * groups * tiles}
    found = kernel(body, inputs, outputs, grid, interpret=interpret, scratch=memory, warpgroups=USERS + 1, approximate=True)
    return found["d_k_nope"], found["d_k_rope"].reshape(batch, groups, length, -1), found["d_value"]


def _store(made: list[tuple[Array, Any, Any]]) -> None:
    """Writes each array through the buffer of this warpgroup, which nobody reads any more, to global memory."""
    for x, buffer, _ in made:
        buffer[...] = x.astype(buffer.dtype)
    plgpu.commit_smem()
    for _, buffer, to in made:
        plgpu.copy_smem_to_gmem(buffer, to)
    plgpu.wait_smem_to_gmem(0)
