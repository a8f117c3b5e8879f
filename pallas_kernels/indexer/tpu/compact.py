"""The places where scores are selected, in order, on TPU: a search in prefix sums, written as products of matrices.

Let c[t] be how many of a query's keys 0 .. t are selected. The p-th selected key, p from 0, is the number of keys with c[t] <= p. Keys are
counted 128 at a time, in segments: one comparison for each p and segment says how many segments lie wholly before, and a product with it
fetches the segment's own c, telescoped: the row for p adds up the differences between neighbouring segments' c, up to its segment. All
numbers that are multiplied are integers of at most 256, exact in bfloat16.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu import tiles
from pallas_kernels.tpu.tiles import LANES, round_up

Array = jax.Array
Ref = Any

ROWS = 8  # queries of a grid step
PLACES = 256  # selected keys that are searched for at a time


def compact(scores: Array, least: Array, last: Array, count: int, *, interpret: tiles.Interpret = False) -> Array:
    """Scores [Q, T], and of each query what `threshold` found: int32 [Q, count], rising; T where fewer are selected.

    Q is a multiple of 128, T of 1024.
    """
    rows, keys = scores.shape
    segments, places = keys // LANES, round_up(count, PLACES)
    before = jnp.asarray(np.triu(np.ones((segments, segments)), 1), jnp.bfloat16)
    upto = np.triu(np.ones((LANES, LANES)))
    within = jnp.asarray(np.concatenate([upto, 1 - upto], axis=1), jnp.bfloat16)
    found = pl.pallas_call(
        _kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(rows // LANES, LANES // ROWS),
            in_specs=[
                pl.BlockSpec((ROWS, segments, LANES), lambda i, j, *_: (i * (LANES // ROWS) + j, 0, 0)),
                pl.BlockSpec(before.shape, lambda i, j, *_: (0, 0)),
                pl.BlockSpec(within.shape, lambda i, j, *_: (0, 0)),
            ],
            out_specs=pl.BlockSpec((places, LANES), lambda i, j, *_: (0, i)),
            scratch_shapes=[pltpu.VMEM((ROWS, segments, 2 * LANES), jnp.bfloat16), pltpu.VMEM((ROWS, segments), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((places, rows), jnp.int32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=tiles.vmem_limit(tiles.chip())
        ),
        interpret=interpret,
        name="index_compact",
    )(least, last, scores.reshape(rows, segments, LANES), before, within)
    return found[:count].T


def _kernel(least: Ref, last: Ref, scores: Ref, before: Ref, within: Ref, out: Ref, steps: Ref, sums: Ref) -> None:
    segments = scores.shape[1]
    dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    plain, transposed = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ()))
    step = pl.program_id(1)  # of the 16 that share a block of results
    first = (pl.program_id(0) * pl.num_programs(1) + step) * ROWS
    query = jax.lax.broadcasted_iota(jnp.int32, (ROWS, segments), 0)
    segment = jax.lax.broadcasted_iota(jnp.int32, (segments, LANES), 0)
    key = segment * LANES + jax.lax.broadcasted_iota(jnp.int32, (segments, LANES), 1)

    def count(row: Any, counts: Array) -> Array:
        x, bound = scores[row], least[first + row]
        chosen = (x > bound) | ((x == bound) & (key <= last[first + row]))
        chosen = jnp.where(chosen, 1.0, 0.0).astype(jnp.bfloat16)
        both = dot(chosen, within[...], plain)  # of its segment, selected up to each key, and after it
        after = jnp.where(segment > 0, pltpu.roll(both[:, LANES:], 1, 0), 0)
        steps[row, :, :LANES] = (both[:, :LANES] + after).astype(jnp.bfloat16)
        steps[row, :, LANES:] = jnp.ones((segments, LANES), jnp.bfloat16)
        return jnp.where(query == row, dot(jnp.ones((ROWS, LANES), jnp.bfloat16), chosen, transposed), counts)

    counts = jax.lax.fori_loop(0, ROWS, count, jnp.zeros((ROWS, segments), jnp.float32))
    sums[...] = dot(counts.astype(jnp.bfloat16), before[...], plain)  # selected in the segments before

    def search(index: Any, carry: None) -> None:
        row, part = index % ROWS, index // ROWS
        start = pl.multiple_of(part * PLACES, PLACES)
        of_segments, place = (
            (start + jax.lax.broadcasted_iota(jnp.int32, (PLACES, lanes), 0)).astype(jnp.float32) for lanes in (segments, LANES)
        )
        begun = jnp.where(sums[pl.ds(row, 1), :] <= of_segments, 1.0, 0.0).astype(jnp.bfloat16)
        both = dot(begun, steps[row], plain)  # c of the segment that holds the place; how many segments have begun
        here = jnp.where(both[:, :LANES] <= place, 1.0, 0.0) + (both[:, LANES:] - 1)
        found = here.sum(axis=1, keepdims=True).astype(jnp.int32)
        lane = jax.lax.broadcasted_iota(jnp.int32, (PLACES, LANES), 1)
        at = pl.ds(start, PLACES)
        out[at, :] = jnp.where(lane == step * ROWS + row, found, out[at, :])

    jax.lax.fori_loop(0, out.shape[0] // PLACES * ROWS, search, None, unroll=4)
