"""The count-th largest of many scores, by bisection of its bits on TPU: what is selected is then a comparison away.

Eight queries' scores stay in VMEM while 32 passes count how many are at least as large as a candidate, from the highest bit to the lowest.
The order of floats is that of their bits but for negative numbers, whose bits are turned around.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu import tiles
from pallas_kernels.tpu.tiles import LANES

Array = jax.Array
Ref = Any

ROWS = 8  # queries of a grid step
SLAB = 8192  # scores of a query that one step of a pass looks at, or fewer: what divides their number
KEYS = 1024  # the number of keys is a multiple of it
LOWEST = 0x00800000  # the lowest finite float among bits in the order of floats, taken as unsigned


def threshold(scores: Array, count: int, *, interpret: tiles.Interpret = False) -> tuple[Array, Array]:
    """Of scores [Q, T] (no NaN, no -0), the least that is selected, float32 [Q], and the last place where one that equals it is, int32 [Q].

    Selected are those larger than it, and those that equal it up to this place: `count`, or all that are not -inf where these are fewer.
    Q is a multiple of 8, T of 1024.
    """
    rows, keys = scores.shape
    found = pl.pallas_call(
        functools.partial(_kernel, count),
        grid=(rows // ROWS,),
        in_specs=[pl.BlockSpec((ROWS, keys), lambda i: (i, 0))],
        out_specs=[pl.BlockSpec((ROWS, LANES), lambda i: (i, 0))] * 2,
        out_shape=[jax.ShapeDtypeStruct((rows, LANES), dtype) for dtype in (jnp.float32, jnp.int32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=tiles.vmem_limit(tiles.chip())),
        interpret=interpret,
        name="index_threshold",
    )(scores)
    return found[0][:, 0], found[1][:, 0]


def _kernel(count: int, scores: Ref, bounds: Ref, last: Ref) -> None:
    keys = scores.shape[1]
    size = tiles.divisor(keys // KEYS, SLAB // KEYS) * KEYS

    def number(holds: Any) -> Array:
        """How many scores of each query `holds`(scores, first place) [ROWS, LANES] is true of, in every lane."""

        def slab(index: Any, totals: tuple[Array, ...]) -> tuple[Array, ...]:
            found, start = list(totals), pl.multiple_of(index * size, size)
            x = scores[:, pl.ds(start, size)]
            for i in range(size // LANES):
                of_lanes = holds(x[:, i * LANES : (i + 1) * LANES], start + i * LANES)
                found[i % len(found)] += jnp.where(of_lanes, 1, 0)
            return tuple(found)

        totals = jax.lax.fori_loop(0, keys // size, slab, (jnp.zeros((ROWS, LANES), jnp.int32),) * 4)
        return jnp.broadcast_to(sum(totals).sum(axis=1, keepdims=True), (ROWS, LANES))

    def bit_of_score(index: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        bits, reached = carry
        candidate = bits | jax.lax.shift_left(jnp.int32(1), 31 - index)
        least = _float(candidate)
        at_least = number(lambda x, at: x >= least)
        enough = at_least >= count
        return jnp.where(enough, candidate, bits), jnp.where(enough, at_least, reached)

    nothing = jnp.zeros((ROWS, LANES), jnp.int32)
    bits, reached = jax.lax.fori_loop(0, 32, bit_of_score, (nothing, nothing))
    fewer = (bits >= 0) & (bits < LOWEST)  # nothing but -inf makes the count full
    bound = _float(jnp.where(fewer, LOWEST, bits))
    bounds[...] = bound
    last[...] = jnp.full((ROWS, LANES), keys, jnp.int32)
    ties = jnp.where(fewer, 0, reached) > count

    @pl.when(jnp.max(jnp.where(ties, 1, 0)) > 0)
    def _() -> None:
        wanted = count - number(lambda x, at: x > bound)
        lane = jax.lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 1)

        def bit_of_place(index: Any, place: Array) -> Array:
            candidate = place | jax.lax.shift_left(jnp.int32(1), keys.bit_length() - 1 - index)
            before = number(lambda x, at: (x == bound) & (at + lane < candidate))
            return jnp.where(before < wanted, candidate, place)

        place = jax.lax.fori_loop(0, keys.bit_length(), bit_of_place, nothing)
        last[...] = jnp.where(ties, place, keys)


def _float(bits: Array) -> Array:
    """The float of these bits, which count upwards as floats do, from 0 as an unsigned number."""
    signed = bits ^ jnp.int32(-(2**31))
    return jax.lax.bitcast_convert_type(jnp.where(signed < 0, signed ^ jnp.int32(2**31 - 1), signed), jnp.float32)
