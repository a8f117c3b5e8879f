"""Gradients of post, of pre and of both at one seam on TPU: one pass over the streams and the gradients that come in.

A small kernel of its own (backward_gates) walks Sinkhorn's steps back first, for all tokens. The kernel here then reads every stream
once and writes every gradient once; its stages stand in backward_scalars and backward_streams. The gradients for gates and biases are
sums over the kernel's gradients for the logits, left to XLA: they are K numbers a token.
"""

from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mhc.spec import Mapping, Weights
from pallas_kernels.mhc.tpu.backward_gates import logits_backward
from pallas_kernels.mhc.tpu.backward_job import NORM_ROWS, Coefficients, Job, terms
from pallas_kernels.mhc.tpu.backward_scalars import diagonals, reading, scalars, spread, spread_norm
from pallas_kernels.mhc.tpu.backward_streams import dots, mixing
from pallas_kernels.mhc.tpu.tiles_backward import LANES, tiles

BY_LANE = {"h", "saved", "d_logits_in", "d_logits", "dh"}  # arrays of a kernel that have tokens last
Gradients = tuple[jax.Array, jax.Array, jax.Array, Weights]


def post_pre_backward(
    x: jax.Array,
    y: jax.Array,
    h: jax.Array,
    weights: Weights,
    mapping: Mapping,
    saved: jax.Array,
    d_between: jax.Array,
    d_u: jax.Array,
    d_h_next: jax.Array,
    *,
    interpret: bool = False,
) -> Gradients:
    """Gradients for x, y, h and weights at one seam, from those for its three results.

    x and d_between [T, n*C], y and d_u [T, C] in the streams' type; h and d_h_next [K, T], saved [K+1, T] float32.
    x' is made again and rounded to the streams' type for the gradients of phi and of the norm; what it is read with gets its gradient
    from products with x and y, in float32. On v6e and tpu7x, x' of bfloat16 streams is mixed in bfloat16 (its error is 2 to 3 roundings).
    Raises ValueError where a stream's width is no multiple of 128, or VMEM holds no tile.
    """
    job = _job(x, mapping, True, True, interpret)
    out = _call(job, x, y, h, weights, saved, d_between, d_u, d_h_next)
    return out["dx"], out["dy"], out["dh"], _weights(job, out, weights, saved)


def pre_backward(
    x: jax.Array,
    weights: Weights,
    mapping: Mapping,
    previous: jax.Array | None,
    saved: jax.Array,
    d_u: jax.Array,
    d_h: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, Weights, jax.Array | None]:
    """Gradients for x, weights and previous (None where mapping reads with its own pre), from those for u and h."""
    job = _job(x, mapping, False, True, interpret)
    out = _call(job, x, None, previous, weights, saved, None, d_u, d_h)
    return out["dx"], _weights(job, out, weights, saved), out.get("dh")


def post_backward(
    x: jax.Array, y: jax.Array, h: jax.Array, mapping: Mapping, d_between: jax.Array, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients for x, y and h from that for the streams after a sublayer."""
    job = _job(x, mapping, True, False, interpret)
    out = _call(job, x, y, h, None, None, d_between, None, None)
    return out["dx"], out["dy"], out["dh"]


def _job(x: jax.Array, mapping: Mapping, post: bool, pre: bool, interpret: bool) -> Job:
    tokens, width = x.shape[0], x.shape[1] // mapping.n
    if x.shape[1] != mapping.n * width or width % LANES:
        raise ValueError(f"x is {list(x.shape)} for {mapping.n} streams; a stream's width must be a multiple of {LANES}")
    return Job(mapping, tiles(mapping, width, tokens, x.dtype), width, tokens, post, pre, interpret)


def _gate(alpha: jax.Array, mapping: Mapping) -> jax.Array:
    """alpha, one gate a group -> one gate a row."""
    return jnp.repeat(alpha, np.array(mapping.groups), total_repeat_length=mapping.rows)


def _weights(job: Job, out: dict[str, jax.Array], weights: Weights, saved: jax.Array) -> Weights:
    dl = out["d_logits"]
    by_row = jnp.sum(dl * saved[:-1], axis=1)
    edges = np.cumsum((0, *job.mapping.groups))
    d_alpha = jnp.stack([jnp.sum(by_row[a:b]) for a, b in pairwise(edges)])
    return Weights(jnp.sum(out["d_phi"], axis=0), d_alpha, jnp.sum(dl, axis=1))


def _call(job: Job, x, y, h, weights, saved, d_between, d_u, d_h) -> dict[str, jax.Array]:
    """One kernel: arrays that a part needs are inputs and outputs by name, the others are left out."""
    n, rows, width, tile = job.n, job.mapping.rows, job.width, job.tiles.tokens
    own = job.mapping.reads == "own"
    count = pl.cdiv(job.tokens, tile)
    steps = pl.cdiv(count, job.tiles.cores)

    def index(core, step):  # cores with a step less repeat their last tile, and leave it as it is
        return jnp.minimum(core * steps + step, count - 1)

    def by_token(size):
        return pl.BlockSpec((tile, size), lambda core, step: (index(core, step), 0))

    def by_lane(size):
        if tile >= LANES:
            return pl.BlockSpec((size, tile), lambda core, step: (0, index(core, step)))
        return pl.BlockSpec((1, size, tile), lambda core, step: (index(core, step), 0, 0))

    def tiled(rows):  # a block with fewer than 128 lanes must be all lanes of its array
        if tile >= LANES:
            return rows
        padded = jnp.pad(rows, ((0, 0), (0, count * tile - job.tokens)))
        return padded.reshape(len(rows), count, tile).swapaxes(0, 1)

    def whole(shape):
        return pl.BlockSpec(shape, lambda core, step: (0, 0), pipeline_mode=pl.Buffered(1))

    streams = jax.ShapeDtypeStruct((job.tokens, n * width), x.dtype)
    coefficients = jax.ShapeDtypeStruct((rows, job.tokens) if tile >= LANES else (count, rows, tile), jnp.float32)
    inputs, outputs = {"x": (x, by_token(n * width))}, {"dx": (streams, by_token(n * width))}
    scratch: dict[str, Any] = {}
    if job.post:
        inputs |= {"y": (y, by_token(width)), "d_mixed_in": (d_between, by_token(n * width))}
        outputs |= {"dy": (jax.ShapeDtypeStruct((job.tokens, width), x.dtype), by_token(width))}
    if job.post or not own:
        inputs |= {"h": (tiled(h), by_lane(rows))}
        outputs |= {"dh": (coefficients, by_lane(rows))}
    if job.post:
        size = job.tiles.gram
        scratch |= {"gram": pltpu.VMEM((tile // size, n * size, _lanes((n + 1) * size)), jnp.float32)}
    if job.pre:
        gate = _gate(weights.alpha, job.mapping)
        d_logits = logits_backward(saved[:-1], d_h, gate, weights.bias, job.mapping, job.interpret)
        phi = _phi(weights.phi, x.dtype)
        inputs |= {
            "phi": (phi, whole(phi.shape)),
            "gate": (gate[:, None], whole((rows, 1))),
            "saved": (tiled(saved), by_lane(rows + 1)),
            "d_logits_in": (tiled(d_logits), by_lane(rows + 2 * n)),
            "d_u": (d_u, by_token(width)),
        }
        outputs |= {
            "d_logits": (coefficients, by_lane(rows)),
            "d_phi": (
                jax.ShapeDtypeStruct((job.tiles.cores, rows, n * width), jnp.float32),
                pl.BlockSpec((1, rows, n * width), lambda core, step: (core, 0, 0)),
            ),
        }
        scratch |= {
            "partial": pltpu.VMEM((n + 1, tile, LANES), jnp.float32),
            "from_phi": pltpu.VMEM((job.tiles.parts, n, tile, job.tiles.lanes), jnp.float32),
            "g_terms": pltpu.VMEM((phi.shape[0], tile), jnp.float32),
            "g_columns": pltpu.VMEM((tile, phi.shape[0]), x.dtype),
            "g_rows": pltpu.VMEM(((rows if x.dtype == jnp.float32 else 2 * rows), tile), x.dtype),
        }
        if job.post:
            scratch |= {
                "mixed": pltpu.VMEM((job.tiles.parts, n, tile, job.tiles.lanes), x.dtype),
                "d_mixed": pltpu.VMEM((job.tiles.parts, n, tile, job.tiles.lanes), x.dtype),
            }
    spread_rows = Coefficients(job).rows
    scratch |= {
        "coefficients": pltpu.VMEM((-(-(spread_rows - 1) // 8) * 8, tile), jnp.float32),
        "spread": pltpu.VMEM((spread_rows, tile, LANES), jnp.float32),
    }
    if job.tiles.narrow:
        scratch |= {"narrow": pltpu.VMEM((spread_rows, tile, job.tiles.narrow), x.dtype)}
    names = [*inputs, *outputs, *scratch]
    out = pl.pallas_call(
        partial(_kernel, job=job, names=names, steps=steps, count=count),
        out_shape=[shape for shape, _ in outputs.values()],
        grid=(job.tiles.cores, steps),
        in_specs=[spec for _, spec in inputs.values()],
        out_specs=[spec for _, spec in outputs.values()],
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=job.tiles.vmem),
        interpret=job.interpret,
        name="mhc_backward",
    )(*[array for array, _ in inputs.values()])
    named = dict(zip(outputs, out))
    if tile < LANES:
        for name in BY_LANE & named.keys():
            named[name] = named[name].swapaxes(0, 1).reshape(rows, -1)[:, : job.tokens]
    return named


def _lanes(size: int) -> int:
    return -(-size // LANES) * LANES


def _phi(phi: jax.Array, dtype) -> jax.Array:
    """phi as the kernel multiplies with it: its terms on top of each other, high, middle, high, and zeros beside the terms of norm."""
    stack = [phi]
    if dtype != jnp.float32:
        high, middle = terms(phi, 2)
        stack = [high, middle, high]
    return jnp.concatenate([*stack, jnp.zeros((NORM_ROWS, phi.shape[1]), jnp.float32)]).astype(dtype)


def _kernel(*args, job: Job, names: list[str], steps: int, count: int):
    refs = dict(zip(names, args))
    if job.tiles.tokens < LANES:
        refs |= {name: refs[name].at[0] for name in BY_LANE & refs.keys()}
    step = pl.program_id(1)
    index = pl.program_id(0) * steps + step
    if job.pre:

        @pl.when(step == 0)
        def _():
            refs["d_phi"][...] = jnp.zeros_like(refs["d_phi"])

    if job.tiles.cores * steps == count:
        _tile(job, refs, index)
    else:
        pl.when(index < count)(partial(_tile, job, refs, index))


def _tile(job: Job, refs, index) -> None:
    """All stages for one tile."""
    n, rows, tile, at = job.n, job.mapping.rows, job.tiles.tokens, Coefficients(job)
    own = job.mapping.reads == "own"
    h: Any = refs["h"][...] if "h" in refs else None
    valid_column = valid = None
    if job.ragged:
        left = job.tokens - index * tile
        valid = jax.lax.broadcasted_iota(jnp.int32, (1, tile), 1) < left
        valid_column = jax.lax.broadcasted_iota(jnp.int32, (tile, 1), 0) < left
    coefficients = refs["coefficients"]
    if not (job.post and job.pre) or at.norm < coefficients.shape[0]:
        coefficients[...] = jnp.zeros_like(coefficients)  # rows that a part lacks: spreading multiplies them by zero, which NaN survives
    if job.post:
        coefficients[at.post : at.post + rows - n] = h[n:]
    if job.pre:
        coefficients[at.pre : at.pre + n] = refs["d_logits_in"][rows : rows + n] if own else h[:n]
    products = dots(job, refs) if job.pre else []
    spread(job, refs)  # beside the scalars, which wait for one another
    if job.pre:
        d_read = reading(job, products, h)
        scalars(job, refs, d_read, valid)
        spread_norm(job, refs)
    mixing(job, refs, valid_column)
    if "dh" not in refs:
        return
    if job.post:
        refs["dh"][n:] = diagonals(job, refs["gram"])[n:rows]
    else:
        refs["dh"][n:] = jnp.zeros((rows - n, tile), jnp.float32)
    for i in range(n):
        refs["dh"][i : i + 1] = d_read[i] if job.pre and not own else jnp.zeros((1, tile), jnp.float32)
