"""The gate with the short convolution on TPU, backward. Tiles go against the order of tokens, on one core.

Per tile, in loops over groups of tokens. First the convolution again, of v from 16 tokens before the tile on, and of its sum the
gradient `d_half`, in float32 into VMEM. Then, with d_half up to 16 tokens after the tile, which the step before left there, what goes back
through the taps:

    e = sum over taps of filter d_half[t + 3 tap]      dv = sum over streams of norm e + alpha d_out + (what norm has of v) v
    d norm = <e, v>      d alpha = <d_out, v> + d norm (d norm / d alpha) + what came in

and through the scores as without a convolution.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.engram_gate.spec import DILATION, TAPS, ShortConv
from pallas_kernels.engram_gate.tpu import factors
from pallas_kernels.engram_gate.tpu.backward import LEAST, SHARES, Columns, shares, through_scores
from pallas_kernels.engram_gate.tpu.conv_forward import BEFORE, half_filter
from pallas_kernels.engram_gate.tpu.groups import Array, Shape, by_group, load, padded, row_blocks, shape_of, sum_of_lanes, to_columns
from pallas_kernels.tpu import tiles
from pallas_kernels.tpu.tiles import LANES, Interpret


def gate_conv_add_backward(
    streams: Array,
    keys_value: Array,
    gain: Array,
    conv: ShortConv,
    conv_eps: float,
    saved: Array,
    d_out: Array,
    d_alpha: Array,
    *,
    interpret: Interpret = False,
) -> tuple[Array, Array, Array, Array, Array]:
    """Gradients for streams and keys_value, in their type, and for gain and the convolution's weight and gain, float32.

    Where tokens do not fill the last tile, the arrays are padded, which copies them. Raises ValueError where VMEM holds no tile.
    """
    tokens, (n, width), chip = streams.shape[0], gain.shape, tiles.chip()
    shape = shape_for(streams, n, interpret)

    scores, square = saved[:-1], saved[-1]
    kinds = factors.gate_factors(scores, d_alpha, width)
    more, sights = factors.conv_factors(kinds[factors.ALPHA], square, conv.reach, conv_eps, width)
    streams, keys_value, d_out = (padded(a, shape, 0) for a in (streams, keys_value, d_out))
    count = len(streams) // shape.tokens

    def index(step):
        return count - 1 - step

    def by_token(size):
        return pl.BlockSpec((shape.tokens, size), lambda step: (index(step), 0))

    def whole(*size):
        return pl.BlockSpec(size, lambda step: (0,) * len(size))

    values_before = pl.BlockSpec((BEFORE, width), lambda step: (jnp.maximum(index(step) * (shape.tokens // BEFORE) - 1, 0), n))
    rows, by_row = row_blocks(padded(factors.stacked([*kinds, *more, *sights]), shape, 1), shape, index)
    blocks = width // LANES
    d_streams, d_keys_value, d_gain, d_taps = pl.pallas_call(
        functools.partial(_kernel, shape),
        grid=(count,),
        in_specs=[
            *(by_token(n * width), by_token((n + 1) * width), by_token(n * width), values_before, by_row),
            *(whole(n, width), whole(TAPS * n, width)),
        ],
        out_specs=[by_token(n * width), by_token((n + 1) * width), whole(SHARES, n * width), whole(SHARES, TAPS * n * width)],
        out_shape=[
            jax.ShapeDtypeStruct(streams.shape, streams.dtype),
            jax.ShapeDtypeStruct(keys_value.shape, keys_value.dtype),
            jax.ShapeDtypeStruct((SHARES, n * width), jnp.float32),
            jax.ShapeDtypeStruct((SHARES, TAPS * n * width), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((shape.tokens, LANES), jnp.float32),
            pltpu.VMEM((blocks, BEFORE + shape.tokens, LANES), jnp.float32),
            pltpu.VMEM((n * blocks, shape.tokens + BEFORE, LANES), jnp.float32),
            pltpu.VMEM((shape.tokens, width), jnp.float32),
            pltpu.VMEM((2 * n, shape.tokens, LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=tiles.vmem_limit(chip)),
        interpret=interpret,
        name="engram_gate_conv_backward",
    )(streams, keys_value, d_out, keys_value, rows, gain, half_filter(conv))
    by_tap = 0.5 * d_taps.sum(axis=0).reshape(TAPS, n, width)
    d_weight, d_conv_gain = by_tap * conv.gain[None], jnp.sum(by_tap * conv.weight, axis=0)
    return d_streams[:tokens], d_keys_value[:tokens], d_gain.sum(axis=0).reshape(n, width), d_weight, d_conv_gain


def shape_for(streams: Array, n: int, interpret: Any = False) -> Shape:
    """Sizes of the kernel. Raises ValueError where VMEM holds no tile."""
    width = streams.shape[1] // n
    height = tiles.round_up(factors.KINDS_OF_CONV * n + 2 * (TAPS - 1), 8)
    floats = 3 * height + (2 * n + 1) * LANES + (n + 2) * width
    fixed = 4 * SHARES * (TAPS + 1) * n * width * 4 + 4 * BEFORE * (n + 2) * width * 4
    return shape_of(streams, n, 5 * n + 2, floats, fixed, interpret, steps=4, least=LEAST)


def _kernel(shape: Shape, *refs: Any) -> None:
    h, kv, d_out, before, rows, gain, taps, dh, dkv, d_gain, d_taps, columns, values, d_halves, d_values, sums = refs
    n, width, tile = shape.n, shape.width, shape.tokens
    sights = factors.KINDS_OF_CONV * n

    @pl.when(pl.program_id(0) == 0)
    def _():
        d_gain[...], d_taps[...] = jnp.zeros_like(d_gain), jnp.zeros_like(d_taps)
        d_halves[:, tile:, :] = jnp.zeros((d_halves.shape[0], BEFORE, LANES), jnp.float32)

    def convolve(index, carry):
        """v in float32, the convolution, and the gradients of its sum and of the filter, for a group."""
        tokens = pl.ds(pl.multiple_of(index * shape.group, shape.group), shape.group)
        factor = Columns(shape, columns, tokens)
        sees = [factor.at(sights + tap) > 0.5 for tap in range(TAPS - 1)]
        here = pl.ds(BEFORE + tokens.start, shape.group)
        for at in shape.lanes():
            values[at // LANES, here, :] = load(kv, tokens, n * width + at)
        for i in range(n):  # streams outside: what a stream needs fits into registers, what all need does not
            weights = [factor(factors.EARLIER + tap - 1 if tap else factors.NORM, i) for tap in range(TAPS)]
            for at in shape.lanes():
                seen = [weights[0] * values[at // LANES, here, :]]
                for tap in range(1, TAPS):
                    earlier = values[at // LANES, pl.ds(here.start - tap * DILATION, shape.group), :]
                    seen.append(jnp.where(sees[tap - 1], weights[tap] * earlier, 0.0))
                half = functools.reduce(jnp.add, [taps[tap * n + i, at : at + LANES][None] * seen[tap] for tap in range(TAPS)])
                t = jnp.tanh(half)
                d_half = load(d_out, tokens, i * width + at) * ((1 + t) * (1 + half * (1 - t)))
                d_halves[(i * width + at) // LANES, tokens, :] = d_half
                for tap in range(TAPS):
                    lane = (tap * n + i) * width + at
                    d_taps[:, lane : lane + LANES] += shares(d_half * seen[tap])
        return carry

    def back(index, carry):
        """dv so far into `d_values`; partial sums of <d_out, v> and <e, v> for every stream into `sums`."""
        tokens = pl.ds(pl.multiple_of(index * shape.group, shape.group), shape.group)
        factor = Columns(shape, columns, tokens)
        alpha, norm = ([factor(kind, i) for i in range(n)] for kind in (factors.ALPHA, factors.NORM))
        seen = [factor.at(sights + TAPS - 1 + tap) > 0.5 for tap in range(TAPS - 1)]
        zero = jnp.zeros((shape.group, LANES), jnp.float32)
        direct, through = [zero] * n, [zero] * n
        for at in shape.lanes():
            value, d_value = load(kv, tokens, n * width + at), zero
            for i in range(n):
                k = (i * width + at) // LANES
                e = taps[i, at : at + LANES][None] * d_halves[k, tokens, :]
                for tap in range(1, TAPS):
                    later = d_halves[k, pl.ds(tokens.start + tap * DILATION, shape.group), :]
                    e += taps[tap * n + i, at : at + LANES][None] * jnp.where(seen[tap - 1], later, 0.0)
                d = load(d_out, tokens, i * width + at)
                d_value += norm[i] * e + alpha[i] * d
                direct[i], through[i] = direct[i] + d * value, through[i] + e * value
            d_values[tokens, at : at + LANES] = d_value
        for i, total in enumerate([*direct, *through]):
            sums[i, tokens, :] = total
        return carry

    def summed(tokens):
        return [sum_of_lanes(sums[i, tokens, :]) for i in range(2 * n)]

    def differentiate(tokens, ready):
        factor, direct, through = Columns(shape, columns, tokens), ready[:n], ready[n:]
        d = [direct[i] + through[i] * factor(factors.BY_ALPHA, i) + factor(factors.D_ALPHA, i) for i in range(n)]
        by_value = functools.reduce(jnp.add, [through[i] * factor(factors.BY_VALUE, i) for i in range(n)])

        def d_value(at):
            return d_values[tokens, at : at + LANES] + by_value * load(kv, tokens, n * width + at)

        through_scores(shape, tokens, d, factor, (h, kv, d_out, gain), (dh, dkv, d_gain), d_value)

    to_columns(rows, columns)
    for at in shape.lanes():
        values[at // LANES, :BEFORE, :] = before[:, at : at + LANES].astype(jnp.float32)
    jax.lax.fori_loop(0, tile // shape.group, convolve, None, unroll=shape.unroll)
    jax.lax.fori_loop(0, tile // shape.group, back, None, unroll=shape.unroll)
    by_group(shape, summed, differentiate)
    d_halves[:, tile:, :] = d_halves[:, :BEFORE, :]
