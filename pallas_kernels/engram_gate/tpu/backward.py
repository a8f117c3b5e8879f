"""The gate without convolution on TPU, backward: one pass over streams, keys, value and the gradient that comes in.

With d the gradient for alpha, <d_out, v> and what came in, and `factors` of a token:

    dh = d_out + d product gain k + d shrink_h h      dk = d product gain h + d shrink_k k      dv = sum over streams of alpha d_out

The gradient of the gain, a sum of d product h k over tokens, stays in VMEM; eight shares of it, and each core's, are added by XLA.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.engram_gate.tpu import factors
from pallas_kernels.engram_gate.tpu.groups import (
    Array,
    Shape,
    by_group,
    load,
    over_lanes,
    padded,
    row_blocks,
    shape_of,
    store,
    sum_of_lanes,
    to_columns,
)
from pallas_kernels.tpu import tiles
from pallas_kernels.tpu.tiles import LANES, Interpret

SHARES = 8  # sublanes of a register: a share of a sum over tokens is of every eighth token
LEAST = 32  # tokens of a tile


def gate_add_backward(
    streams: Array, keys_value: Array, gain: Array, saved: Array, d_out: Array, d_alpha: Array, *, interpret: Interpret = False
) -> tuple[Array, Array, Array]:
    """Gradients for streams and keys_value, in their type, and for gain, float32.

    Where tokens do not fill the last tile, the arrays are padded, which copies them. Raises ValueError where VMEM holds no tile.
    """
    tokens, (n, width), chip = streams.shape[0], gain.shape, tiles.chip()
    shape = shape_for(streams, n, interpret)
    streams, keys_value, d_out = (padded(a, shape, 0) for a in (streams, keys_value, d_out))
    count = len(streams) // shape.tokens
    cores = chip.cores if count % chip.cores == 0 else 1
    steps = count // cores

    def index(core, step):
        return core * steps + step

    def by_token(size):
        return pl.BlockSpec((shape.tokens, size), lambda core, step: (index(core, step), 0))

    rows = factors.stacked(factors.gate_factors(saved, d_alpha, width))
    rows, by_row = row_blocks(padded(rows, shape, 1), shape, index)
    d_streams, d_keys_value, d_gain = pl.pallas_call(
        functools.partial(_kernel, shape),
        grid=(cores, steps),
        in_specs=[
            *(by_token(n * width), by_token((n + 1) * width), by_token(n * width), by_row),
            pl.BlockSpec((n, width), lambda core, step: (0, 0)),
        ],
        out_specs=[
            *(by_token(n * width), by_token((n + 1) * width)),
            pl.BlockSpec((None, SHARES, n * width), lambda core, step: (core, 0, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(streams.shape, streams.dtype),
            jax.ShapeDtypeStruct(keys_value.shape, keys_value.dtype),
            jax.ShapeDtypeStruct((cores, SHARES, n * width), jnp.float32),
        ],
        scratch_shapes=[pltpu.VMEM((shape.tokens, LANES), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=tiles.vmem_limit(chip)),
        interpret=interpret,
        name="engram_gate_backward",
    )(streams, keys_value, d_out, rows, gain)
    return d_streams[:tokens], d_keys_value[:tokens], d_gain.sum(axis=(0, 1)).reshape(n, width)


def shape_for(streams: Array, n: int, interpret: Any = False) -> Shape:
    """Sizes of the kernel. Raises ValueError where VMEM holds no tile."""
    floats = 3 * tiles.round_up(factors.KINDS * n, 8) + LANES
    return shape_of(streams, n, 5 * n + 2, floats, 4 * SHARES * streams.shape[1] * 4, interpret, steps=4, least=LEAST)


def _kernel(shape: Shape, h: Any, kv: Any, d_out: Any, rows: Any, gain: Any, dh: Any, dkv: Any, d_gain: Any, columns: Any) -> None:
    n = shape.n

    @pl.when(pl.program_id(1) == 0)
    def _():
        d_gain[...] = jnp.zeros_like(d_gain)

    def dots(tokens):
        """128 partial sums of <d_out, v> for every stream."""
        sums = [jnp.zeros((shape.group, LANES), jnp.float32)] * n
        for at in shape.lanes():
            value = load(kv, tokens, n * shape.width + at)
            sums = [total + load(d_out, tokens, i * shape.width + at) * value for i, total in enumerate(sums)]
        return sums

    def differentiate(tokens, partial):
        factor = Columns(shape, columns, tokens)
        d = [sum_of_lanes(p) + factor(factors.D_ALPHA, i) for i, p in enumerate(partial)]
        alpha = [factor(factors.ALPHA, i) for i in range(n)]

        def d_value(at):
            return functools.reduce(jnp.add, [alpha[i] * load(d_out, tokens, i * shape.width + at) for i in range(n)])

        through_scores(shape, tokens, d, factor, (h, kv, d_out, gain), (dh, dkv, d_gain), d_value)

    to_columns(rows, columns)
    by_group(shape, dots, differentiate)


class Columns:
    """Numbers of a group of tokens, each over all lanes."""

    def __init__(self, shape: Shape, columns: Any, tokens: Any):
        self.n, self.block = shape.n, columns[tokens, :]

    def __call__(self, kind: int, i: int) -> Array:
        return self.at(kind * self.n + i)

    def at(self, k: int) -> Array:
        """Row k of the rows that the columns were made of."""
        return over_lanes(self.block[:, k : k + 1], self.block)


def through_scores(shape: Shape, tokens: Any, d: list[Array], factor: Columns, inputs: Any, outputs: Any, d_value: Any) -> None:
    """Of d, gradients for alpha over all lanes, the gradients for h, k and the gain; `d_value(at)` says those for v."""
    n, width = shape.n, shape.width
    (h, kv, d_out, gain), (dh, dkv, d_gain) = inputs, outputs
    kinds = (factors.PRODUCT, factors.SHRINK_H, factors.SHRINK_KEY)
    by_product, by_h, by_key = ([d[i] * factor(kind, i) for i in range(n)] for kind in kinds)
    for at in shape.lanes():
        for i in range(n):
            lane = i * width + at
            x, k, g = load(h, tokens, lane), load(kv, tokens, lane), gain[i : i + 1, at : at + LANES]
            weighted = by_product[i] * x
            store(dh, tokens, lane, load(d_out, tokens, lane) + by_product[i] * (k * g) + by_h[i] * x)
            store(dkv, tokens, lane, weighted * g + by_key[i] * k)
            d_gain[:, lane : lane + LANES] += shares(weighted * k)
        store(dkv, tokens, n * width + at, d_value(at))


def shares(block: Array) -> Array:
    """[tokens, 128] -> [8, 128], sums of every eighth token."""
    return block.reshape(-1, SHARES, LANES).sum(axis=0)
