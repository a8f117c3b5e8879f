"""The gate with the short convolution on TPU, forward. Tiles go in the order of tokens; the end of one is the start of the next.

What the convolution sees is alpha v under a norm, and that is a number a token, `norm`, times v: so of earlier tokens v and n numbers are
kept, for a tile and the 16 tokens before it. Where a core begins in the middle, those numbers are made again.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.engram_gate.spec import DILATION, TAPS, ShortConv
from pallas_kernels.engram_gate.tpu.forward import keep, products, scores
from pallas_kernels.engram_gate.tpu.groups import (
    Array,
    Shape,
    by_group,
    load,
    over_lanes,
    shape_of,
    store,
    sum_of_lanes,
    to_columns,
    to_rows,
)
from pallas_kernels.tpu import tiles
from pallas_kernels.tpu.tiles import LANES, Interpret

BEFORE = 16  # tokens before a tile that are kept: no fewer than the convolution reaches, and whole registers of any type


def gate_conv_add(
    streams: Array, keys_value: Array, gain: Array, conv: ShortConv, norm_eps: float, conv_eps: float, *, interpret: Interpret = False
) -> tuple[Array, Array, Array]:
    """As `gate_add`, with the convolution; `saved` is [3n + 1, T], the mean square of v last."""
    tokens, (n, width) = streams.shape[0], gain.shape
    if tokens < LANES:
        pad = ((0, LANES - tokens), (0, 0))
        longer = conv._replace(reach=jnp.pad(conv.reach, pad[0]))
        args = (jnp.pad(streams, pad), jnp.pad(keys_value, pad), gain, longer, norm_eps, conv_eps)
        out, alpha, saved = gate_conv_add(*args, interpret=interpret)
        return out[:tokens], alpha[:, :tokens], saved[:, :tokens]
    chip = tiles.chip()
    shape = shape_for(streams, n, interpret)
    count = pl.cdiv(tokens, shape.tokens)
    cores = chip.cores if count >= chip.cores else 1
    steps = pl.cdiv(count, cores)

    def index(core, step):  # a core with a step less repeats the last tile, and leaves it as it is
        return jnp.minimum(core * steps + step, count - 1)

    def by_token(size):
        return pl.BlockSpec((shape.tokens, size), lambda core, step: (index(core, step), 0))

    def before(size):
        return pl.BlockSpec((BEFORE, size), lambda core, step: (jnp.maximum(core * steps * (shape.tokens // BEFORE) - 1, 0), 0))

    def by_row(rows):
        return pl.BlockSpec((rows, shape.tokens), lambda core, step: (0, index(core, step)))

    def whole(*size):
        return pl.BlockSpec(size, lambda core, step: (0,) * len(size))

    blocks = width // LANES
    out, alpha, saved = pl.pallas_call(
        functools.partial(_kernel, shape, norm_eps, conv_eps, count),
        grid=(cores, steps),
        in_specs=[
            *(by_token(n * width), by_token((n + 1) * width), before(n * width), before((n + 1) * width)),
            *(whole(n, width), whole(TAPS * n, width), by_row(8)),
        ],
        out_specs=[by_token(n * width), by_row(n), by_row(3 * n + 1)],
        out_shape=[
            jax.ShapeDtypeStruct(streams.shape, streams.dtype),
            jax.ShapeDtypeStruct((n, tokens), jnp.float32),
            jax.ShapeDtypeStruct((3 * n + 1, tokens), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((shape.tokens, LANES), jnp.float32),
            pltpu.VMEM((shape.tokens, LANES), jnp.float32),
            pltpu.VMEM((blocks, BEFORE + shape.tokens, LANES), jnp.float32),
            pltpu.VMEM((n, BEFORE + shape.tokens, LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=tiles.vmem_limit(chip)),
        interpret=interpret,
        name="engram_gate_conv",
    )(streams, keys_value, streams, keys_value, gain, half_filter(conv), reach_rows(conv.reach))
    return out, alpha, saved


def shape_for(streams: Array, n: int, interpret: Any = False) -> Shape:
    """Sizes of the kernel. Raises ValueError where 128 tokens do not fit into VMEM."""
    floats = 8 * n + 32 + (3 + n) * LANES + streams.shape[1] // n
    return shape_of(streams, n, 3 * n + 1, floats, 10 * TAPS * streams.shape[1] * 4, interpret, steps=4)


def half_filter(conv: ShortConv) -> Array:
    """[4n, C]: half of weight times gain, taps first. Half, because SiLU(z) is z/2 + z/2 tanh(z/2)."""
    return (0.5 * conv.weight * conv.gain[None]).reshape(-1, conv.gain.shape[1])


def reach_rows(reach: Array) -> Array:
    """[8, T] float32, all rows the same: a block has whole registers."""
    return jnp.broadcast_to(jnp.minimum(reach, BEFORE).astype(jnp.float32)[None], (8, len(reach)))


def _kernel(shape: Shape, norm_eps: float, conv_eps: float, count: int, *refs: Any) -> None:
    h, kv, h_before, kv_before, gain, taps, reach, out, alpha, saved, columns, reaches, values, norms = refs
    n, width, core, step = shape.n, shape.width, pl.program_id(0), pl.program_id(1)

    def numbers_of(h, kv, tokens, partial):
        """What `scores` finds, mean squares of v, and norms."""
        sums, squares = partial
        found = scores(shape, norm_eps, sums)
        square = sum_of_lanes(squares) * (1 / width)
        return found, square, [a * jax.lax.rsqrt(a * a * square + conv_eps) for a in found[-1]]

    def prepare_of(h, kv):
        def prepare(tokens):
            squares = jnp.zeros((shape.group, LANES), jnp.float32)
            for at in shape.lanes():
                value = load(kv, tokens, n * width + at)
                squares += value * value
            return products(shape, h, kv, gain, tokens), squares

        return prepare

    @pl.when(step == 0)
    def _():
        for start in range(0, BEFORE, shape.group):
            tokens = pl.ds(start, shape.group)
            _, _, norm = numbers_of(h_before, kv_before, tokens, prepare_of(h_before, kv_before)(tokens))
            for i in range(n):
                norms[i, tokens, :] = jnp.where(core > 0, norm[i], 0.0)
            for at in shape.lanes():
                values[at // LANES, tokens, :] = jnp.where(core > 0, load(kv_before, tokens, n * width + at), 0.0)

    @pl.when(step > 0)
    def _():
        for ref in (values, norms):
            ref[:, :BEFORE, :] = ref[:, shape.tokens :, :]

    def add(tokens, partial):
        found, square, norm = numbers_of(h, kv, tokens, partial)
        keep(columns, tokens, [*(number for kind in found[:3] for number in kind), square, *found[3]])
        here = pl.ds(BEFORE + tokens.start, shape.group)
        for i in range(n):
            norms[i, here, :] = norm[i]
        seen = over_lanes(reaches[tokens, :1], square)
        earlier = [pl.ds(BEFORE + tokens.start - tap * DILATION, shape.group) for tap in range(TAPS)]
        sees = [seen >= tap * DILATION for tap in range(TAPS)]
        weights = [[norm[i] if tap == 0 else jnp.where(sees[tap], norms[i, earlier[tap], :], 0.0) for tap in range(TAPS)] for i in range(n)]
        for at in shape.lanes():
            value = load(kv, tokens, n * width + at)
            values[at // LANES, here, :] = value
            tapped = [value] + [jnp.where(sees[tap], values[at // LANES, earlier[tap], :], 0.0) for tap in range(1, TAPS)]
            for i in range(n):
                half = half_sum(shape, taps, weights[i], tapped, i, at)
                added = half + half * jnp.tanh(half) + found[3][i] * value
                store(out, tokens, i * width + at, load(h, tokens, i * width + at) + added)

    @pl.when(core * pl.num_programs(1) + step < count)
    def _():
        to_columns(reach, reaches)
        by_group(shape, prepare_of(h, kv), add)
        to_rows(columns, 0, saved)
        to_rows(columns, 3 * n + 1, alpha)


def half_sum(shape: Shape, taps: Any, weights: list[Array], tapped: list[Array], i: int, at: int) -> Array:
    """Half of the convolution's sum for a block of lanes of stream i."""
    total = jnp.zeros_like(tapped[0])
    for tap in range(TAPS):
        k = tap * shape.n + i
        total += taps[k : k + 1, at : at + LANES] * (weights[tap] * tapped[tap])
    return total
