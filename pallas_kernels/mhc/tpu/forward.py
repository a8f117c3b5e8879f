"""Forward kernels on TPU: post and the next pre at one seam, and each alone. One kernel body: `post` and `pre` leave parts of it out.

A tile of tokens is mixed into VMEM and projected from there (x' is never read back from HBM), its coefficients are made with tokens on
lanes, and then it is read. x' is rounded to the streams' type before anything is made of it, so the seam is exactly its two halves.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mhc.spec import Mapping, Weights
from pallas_kernels.mhc.tpu import streams
from pallas_kernels.mhc.tpu.sinkhorn import coefficients
from pallas_kernels.tpu import tiles
from pallas_kernels.tpu.tiles import LANES, Interpret


def post_pre(
    x: jax.Array, y: jax.Array, h: jax.Array, weights: Weights, mapping: Mapping, *, interpret: Interpret = False
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """x [T, nC], y [T, C], h [K, T] -> between [T, nC], u [T, C], h_next [K, T], saved [K + 1, T].

    Streams are bfloat16 or float32, the rest float32; C is a multiple of 128. `saved` has z, the projections before alpha and bias, and
    last the inverse rms. Raises ValueError where 128 tokens do not fit into VMEM.
    """
    return _call(mapping, x, y=y, h=h, weights=weights, interpret=interpret)


def pre(
    x: jax.Array, weights: Weights, mapping: Mapping, previous: jax.Array | None = None, *, interpret: Interpret = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x [T, nC] -> u [T, C], h [K, T], saved [K + 1, T], as `post_pre`. `previous` is the h that reads where the mapping says so."""
    return _call(mapping, x, h=previous if mapping.reads == "previous" else None, weights=weights, interpret=interpret)


def post(x: jax.Array, y: jax.Array, h: jax.Array, mapping: Mapping, *, interpret: Interpret = False) -> jax.Array:
    """x [T, nC], y [T, C], h [K, T] -> between [T, nC], as `post_pre`."""
    return _call(mapping, x, y=y, h=h, interpret=interpret)[0]


def _kernel(shape: streams.Shape, names: tuple[str, ...], *refs: Any) -> None:
    ref = dict(zip(names, refs))
    planes, columns, squares = ref["planes"], ref["columns"], ref.get("squares")
    x, h, u = ref["x"], ref.get("h"), ref.get("u")
    reads_own = shape.mapping.reads == "own"
    if h is not None:
        streams.to_planes(shape, h, planes)
        if not (shape.terms and reads_own):
            streams.to_columns(shape, planes, columns)
    if "y" in ref:
        between = ref["between"]
        if shape.terms:
            streams.to_diagonals(shape, planes, ref["spread"], ref["diagonals"])
            streams.mix_on_mxu(shape, x, ref["y"], ref["diagonals"], between, squares)
            _mix_again_if_not_finite(shape, x, ref["y"], planes, columns, between, squares)
        else:
            streams.mix(shape, x, ref["y"], columns, between, squares)
        x = between
    if u is None:
        return
    if "y" not in ref:
        streams.square(shape, x, squares)
    if not reads_own:
        streams.read(shape, x, columns, u)
    streams.project(shape, x, ref["phi"], squares, planes, ref["saved"])
    _gates(shape, planes, ref["alpha"], ref["bias"])
    streams.from_planes(shape, planes, ref["h_next"])
    if reads_own:
        streams.to_columns(shape, planes, columns)
        streams.read(shape, x, columns, u)


def _mix_again_if_not_finite(shape, x, y, planes, columns, between, squares):
    """In a product of matrices zero times NaN spoils a token's neighbours: then the tile is mixed again token by token, slowly."""

    @pl.when(jnp.logical_not(jnp.sum(squares[:, :]) < jnp.inf))
    def _():
        streams.to_columns(shape, planes, columns)
        streams.mix(dataclasses.replace(shape, group=8, unroll=1, compact=True), x, y, columns, between, squares)


def _gates(shape: streams.Shape, planes: Any, alpha: Any, bias: Any) -> None:
    """Rows of z -> rows of h, in place, each as a plane of all the tile's tokens."""
    gate = [g for g, size in enumerate(shape.mapping.groups) for _ in range(size)]
    at = [pl.ds(k, shape.chunks, stride=shape.rows) for k in range(shape.mapping.rows)]
    logits = [alpha[0, gate[k]] * planes[at[k], :] + bias[0, k] for k in range(len(at))]
    for k, plane in enumerate(coefficients(logits, shape.mapping)):
        planes[at[k], :] = plane


def _call(mapping: Mapping, x, *, y=None, h=None, weights=None, interpret: Interpret):
    tokens, depth = x.shape
    if tokens < LANES:
        pad = LANES - tokens
        x, y = (None if a is None else jnp.pad(a, ((0, pad), (0, 0))) for a in (x, y))
        h = None if h is None else jnp.pad(h, ((0, 0), (0, pad)))
        outs = _call(mapping, x, y=y, h=h, weights=weights, interpret=interpret)
        streamed = (y is not None) + (weights is not None)  # the outputs that have tokens first
        return tuple(out[:tokens] if i < streamed else out[:, :tokens] for i, out in enumerate(outs))

    chip = tiles.chip()
    shape = shape_for(mapping, x, mixes=y is not None, reads=weights is not None, chip=chip, small=bool(interpret))
    inputs, outputs, scratch = {}, {}, {}

    def by_token(size, dtype):
        return jax.ShapeDtypeStruct((tokens, size), dtype), pl.BlockSpec((shape.tokens, size), lambda t: (t, 0))

    def by_row(rows):
        return jax.ShapeDtypeStruct((rows, tokens), jnp.float32), pl.BlockSpec((rows, shape.tokens), lambda t: (0, t))

    def whole(array):
        return array, pl.BlockSpec(array.shape, lambda t: (0, 0))

    scratch["planes"] = pltpu.VMEM((shape.chunks * shape.rows, LANES), jnp.float32)
    scratch["columns"] = pltpu.VMEM((shape.tokens, LANES), jnp.float32)
    scratch["squares"] = pltpu.VMEM((shape.tokens, LANES), jnp.float32)
    inputs["x"] = x, by_token(depth, x.dtype)[1]
    if h is not None:
        inputs["h"] = h, by_row(mapping.rows)[1]
    if y is not None:
        inputs["y"] = y, by_token(shape.width, y.dtype)[1]
        outputs["between"] = by_token(depth, x.dtype)
        if shape.terms:
            spread = streams.spread_matrix(shape)
            inputs["spread"] = whole(jnp.asarray(spread, jnp.bfloat16))
            blocks = (shape.tokens // shape.group, mapping.n * shape.group, spread.shape[1] // mapping.n)
            scratch["diagonals"] = pltpu.VMEM(blocks, jnp.float32)
    if weights is not None:
        inputs["phi"] = whole(_split(weights.phi, shape.rows, x.dtype))
        for name, values in (("alpha", weights.alpha), ("bias", weights.bias)):
            inputs[name] = values[None], pl.BlockSpec(memory_space=pltpu.SMEM)
        outputs["u"] = by_token(shape.width, x.dtype)
        outputs["h_next"], outputs["saved"] = by_row(mapping.rows), by_row(mapping.rows + 1)
    return pl.pallas_call(
        functools.partial(_kernel, shape, (*inputs, *outputs, *scratch)),
        grid=(pl.cdiv(tokens, shape.tokens),),
        in_specs=[spec for _, spec in inputs.values()],
        out_specs=[spec for _, spec in outputs.values()],
        out_shape=[out for out, _ in outputs.values()],
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=tiles.vmem_limit(chip)),
        interpret=interpret,
    )(*(value for value, _ in inputs.values()))


def shape_for(mapping: Mapping, x: jax.Array, *, mixes: bool, reads: bool, chip: tiles.Chip, small: bool) -> streams.Shape:
    """Sizes for a chip. `small`: without unrolling, which interpretation has to pay for and has nothing of."""
    depth, size = x.shape[1], x.dtype.itemsize
    width, rows = depth // mapping.n, tiles.round_up(mapping.rows, 8)
    group = 8 if chip.mxu == LANES else 16
    terms = 2 if mixes and mapping.mixes and x.dtype == jnp.bfloat16 else 0
    streamed = (2 * depth + width if mixes else depth) + (width if reads else 0)
    diagonals = mapping.n * tiles.round_up(terms * (mapping.n + 1) * group, LANES)
    per_token = 2 * (streamed * size + 3 * 4 * rows) + 4 * (2 * LANES + rows + diagonals)
    fixed = 2 * tiles.MIB + (2 * 4 * rows * depth if reads else 0)
    tile = tiles.token_tile(x.shape[0], per_token, fixed, chip)
    steps = (80 if chip.mxu == LANES else 160) * LANES // width  # more code than this takes too long to compile
    unroll = 1 if small else tiles.divisor(tile // group, max(1, steps))
    lanes = LANES * tiles.divisor(width // LANES, 2)
    return streams.Shape(mapping, width, tile, rows, group, unroll, lanes, terms, min(tile, chip.mxu))


def _split(phi: jax.Array, rows: int, dtype: Any) -> jax.Array:
    """phi [K, nC] as it is multiplied: padded to `rows`, and against bfloat16 streams as two bfloat16 terms, one below the other."""
    phi = jnp.pad(phi, ((0, rows - phi.shape[0]), (0, 0)))
    if dtype == jnp.float32:
        return phi
    high = phi.astype(jnp.bfloat16)
    return jnp.concatenate([high, (phi - high.astype(jnp.float32)).astype(jnp.bfloat16)])
