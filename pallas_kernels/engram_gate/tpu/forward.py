"""The gate without convolution on TPU, forward: one pass over streams, keys and value.

A group of tokens is loaded twice from VMEM: for its sums over lanes, of which follows alpha, and for the addition.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.engram_gate.spec import CLAMP
from pallas_kernels.engram_gate.tpu.groups import Array, Shape, by_group, load, shape_of, store, sum_of_lanes, to_rows
from pallas_kernels.tpu import tiles
from pallas_kernels.tpu.tiles import LANES, Interpret


def gate_add(
    streams: Array, keys_value: Array, gain: Array, norm_eps: float, *, interpret: Interpret = False
) -> tuple[Array, Array, Array]:
    """Streams [T, nC], keys_value [T, (n+1)C], gain [n, C] float32 -> streams [T, nC], alpha [n, T], saved [3n, T] (see `xla`).

    Streams are bfloat16 or float32, C is a multiple of 128. Raises ValueError where 128 tokens do not fit into VMEM.
    """
    tokens, (n, width) = streams.shape[0], gain.shape
    if tokens < LANES:
        pad = ((0, LANES - tokens), (0, 0))
        out, alpha, saved = gate_add(jnp.pad(streams, pad), jnp.pad(keys_value, pad), gain, norm_eps, interpret=interpret)
        return out[:tokens], alpha[:, :tokens], saved[:, :tokens]
    shape = shape_for(streams, n, interpret)

    def by_token(size):
        return pl.BlockSpec((shape.tokens, size), lambda t: (t, 0))

    def by_row(rows):
        return pl.BlockSpec((rows, shape.tokens), lambda t: (0, t))

    return pl.pallas_call(
        functools.partial(_kernel, shape, norm_eps),
        grid=(pl.cdiv(tokens, shape.tokens),),
        in_specs=[by_token(n * width), by_token((n + 1) * width), pl.BlockSpec((n, width), lambda t: (0, 0))],
        out_specs=[by_token(n * width), by_row(n), by_row(3 * n)],
        out_shape=[
            jax.ShapeDtypeStruct(streams.shape, streams.dtype),
            jax.ShapeDtypeStruct((n, tokens), jnp.float32),
            jax.ShapeDtypeStruct((3 * n, tokens), jnp.float32),
        ],
        scratch_shapes=[pltpu.VMEM((shape.tokens, LANES), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=tiles.vmem_limit(tiles.chip())),
        interpret=interpret,
        name="engram_gate",
    )(streams, keys_value, gain)


def shape_for(streams: Array, n: int, interpret: Any = False) -> Shape:
    """Sizes of the kernel. Raises ValueError where 128 tokens do not fit into VMEM."""
    return shape_of(streams, n, 3 * n + 1, 8 * n + 2 * LANES, 8 * streams.shape[1] * 4, interpret, steps=4)


def _kernel(shape: Shape, norm_eps: float, h: Any, kv: Any, gain: Any, out: Any, alpha: Any, saved: Any, columns: Any) -> None:
    n, width = shape.n, shape.width

    def add(tokens, partial):
        numbers = scores(shape, norm_eps, partial)
        alphas = numbers[-1]
        keep(columns, tokens, [number for kind in numbers for number in kind])
        for at in shape.lanes():
            value = load(kv, tokens, n * width + at)
            for i in range(n):
                store(out, tokens, i * width + at, load(h, tokens, i * width + at) + alphas[i] * value)

    by_group(shape, lambda tokens: products(shape, h, kv, gain, tokens), add)
    to_rows(columns, 0, saved)
    to_rows(columns, 3 * n, alpha)


def products(shape: Shape, h: Any, kv: Any, gain: Any, tokens: Any) -> list[tuple[Array, Array, Array]]:
    """128 partial sums of h k gain, h^2 and k^2 for every stream."""
    zero = jnp.zeros((shape.group, LANES), jnp.float32)
    found = []
    for i in range(shape.n):
        dot, of_h, of_key = zero, zero, zero
        for at in shape.lanes():
            x, k = load(h, tokens, i * shape.width + at), load(kv, tokens, i * shape.width + at)
            dot += x * k * gain[i : i + 1, at : at + LANES]
            of_h += x * x
            of_key += k * k
        found.append((dot, of_h, of_key))
    return found


def scores(shape: Shape, norm_eps: float, partial: list[tuple[Array, Array, Array]]) -> tuple[list[Array], ...]:
    """Of every stream, over all lanes: scores, inverse rms of h and of k, alpha."""
    width = shape.width
    found = []
    for dot, of_h, of_key in partial:
        inverse_h, inverse_key = (jax.lax.rsqrt(sum_of_lanes(squares) * (1 / width) + norm_eps) for squares in (of_h, of_key))
        score = sum_of_lanes(dot) * inverse_h * inverse_key * width**-0.5
        found.append((score, inverse_h, inverse_key, gate(score)))
    return tuple(map(list, zip(*found)))


def keep(columns: Any, tokens: Any, numbers: list[Array]) -> None:
    """Numbers that stand in every lane [tokens, 128] -> lane k of `columns` for the k-th."""
    lane = jax.lax.broadcasted_iota(jnp.int32, numbers[0].shape, 1)
    block = jnp.zeros_like(numbers[0])
    for k, number in enumerate(numbers):
        block = jnp.where(lane == k, number, block)
    columns[tokens, :] = block


def gate(score: Array) -> Array:
    """alpha of scores: the sigmoid of their signed root, by the exponential of minus its magnitude, which cannot overflow."""
    root = jnp.sqrt(jnp.maximum(jnp.abs(score), CLAMP))
    small = jnp.exp(-root)
    return jnp.where(jax.lax.bitcast_convert_type(score, jnp.int32) < 0, small, 1.0) / (1.0 + small)
