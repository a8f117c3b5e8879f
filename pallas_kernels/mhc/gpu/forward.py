"""The kernel that streams forward: mixes streams, projects them on phi, reads them; any of the three, in one pass.

One program is one warpgroup with 64 tokens and some of the columns, in chunks that are copied and computed at the same time. A matrix
[64 tokens, chunk] is in registers as wgmma lays it out, so a coefficient is a vector that belongs to its rows. What is mixed is rounded,
written to shared memory for the store, and from there read by wgmma: projection, mean square and reading see the rounded value.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.launch import (
    COLUMN,
    MULTIPROCESSORS,
    SHARED_MEMORY,
    TOKENS,
    Tile,
    as_matrix,
    check_wgmma,
    kernel,
    layout,
    pipeline,
    shared,
)
from pallas_kernels.mhc.gpu import tokens as tk


@dataclass(frozen=True)
class Plan:
    """Columns in a chunk, pipeline stages, and the programs that share the columns of a tile of tokens."""

    chunk: int
    stages: int
    splits: int


def plan(tokens: int, width: int, loaded: Callable[[int], int], other: Callable[[int], int]) -> Plan:
    """The widest chunk with two stages, or failing that the narrowest with one.

    `loaded`: bytes of a stage, `other`: bytes besides, for a chunk.
    """
    fits = [(c, (SHARED_MEMORY - other(c)) // loaded(c)) for c in (64, 32, 16)]
    chunk, stages = next(((c, s) for c, s in fits if s >= 2), fits[-1])
    chunks, tiles = width // chunk, tk.count(tokens)
    splits = max(s for s in range(1, chunks + 1) if chunks % s == 0 and (s == 1 or tiles * s <= MULTIPROCESSORS))
    return Plan(chunk, max(1, min(4, stages)), splits)


def terms(phi: jax.Array, columns: int) -> jax.Array:
    """phi [K, D] float32 -> [D, columns] bfloat16: the two leading terms, K columns each, and zeros."""
    high = jax.lax.reduce_precision(phi, exponent_bits=8, mantissa_bits=7)  # XLA may drop a pair of casts
    both = jnp.concatenate([high, phi - high]).astype(jnp.bfloat16)
    return jnp.pad(both, ((0, columns - both.shape[0]), (0, 0))).T


def dots(x: jax.Array, y: jax.Array | None, d_u: jax.Array, n: int, *, interpret: bool = False) -> jax.Array:
    """<d_u, x_j> for each stream and, where there is y, <d_u, y> after them: [n or n + 1, T] float32."""
    tokens, width = d_u.shape
    many, size = n + (y is not None), x.dtype.itemsize
    planned = plan(tokens, width, lambda c: TOKENS * c * size * (many + 1), lambda c: 0)
    chunk, chunks = planned.chunk, width // planned.chunk // planned.splits
    inputs = {name: tk.padded(a) for name, a in {"x": x, "y": y, "d_u": d_u}.items() if a is not None}

    def body(refs):
        tile, part = jax.lax.axis_index("tile"), jax.lax.axis_index("part")
        first = tk.start(tile, tokens)

        def columns(name, i):
            return Tile(refs[name], (TOKENS, chunk), lambda step: (first, i * width + (part * chunks + step) * chunk))

        def step(_, loaded, stored, sums):
            *factors, d = [as_matrix(ref, interpret) for name in inputs for ref in loaded[name]]
            return [a + jnp.sum(factor * d, axis=1) for a, factor in zip(sums, factors)]

        loads = {name: [columns(name, j) for j in range(n if name == "x" else 1)] for name in inputs}
        zeros = [layout(jnp.zeros((TOKENS,), jnp.float32), COLUMN, interpret) for _ in range(many)]
        for k, a in enumerate(pipeline(step, chunks, loads, {}, planned.stages, carry=zeros)):
            refs["dots"][part, tile, k] = a

    outputs = {"dots": jax.ShapeDtypeStruct((planned.splits, tk.count(tokens), many, TOKENS), jnp.float32)}
    grid = {"tile": tk.count(tokens), "part": planned.splits}
    return tk.untiled(kernel(body, inputs, outputs, grid, interpret=interpret)["dots"].sum(axis=0), tokens)


def _products(rows: int, chunk: int) -> int:
    """Columns of a projection: two terms of phi, in rows of as many bytes as a chunk of the streams has in bfloat16."""
    return -(-2 * rows // chunk) * chunk


def stream(
    x: jax.Array,
    y: jax.Array | None,
    n: int,
    *,
    post: jax.Array | None = None,
    res: jax.Array | None = None,
    pre: jax.Array | None = None,
    phi: jax.Array | None = None,
    interpret: bool = False,
) -> dict[str, jax.Array]:
    """Streams x [T, nC], y [T, C], coefficients post [n, T], res [n*n, T] or None for the identity, pre [n, T], phi [K, nC] float32.

    With post, the streams are mixed: "between" [T, nC]; with pre, they are then read: "u" [T, C]; with phi, "sums" is [K+1, T] float32: the
    raw products with phi, and the sums of squares.
    """
    tokens, width, size = x.shape[0], x.shape[1] // n, x.dtype.itemsize
    mixes, projects, reads = post is not None, phi is not None, pre is not None
    if projects:
        check_wgmma(interpret)
    split = projects and x.dtype == jnp.float32  # float32 streams are projected in two terms
    rows = 0 if phi is None else phi.shape[0]
    gates = [a for a in (post, res, pre) if a is not None] or [jnp.zeros((1, tokens), jnp.float32)]
    tall = sum(map(len, gates))
    planned = plan(
        tokens,
        width,
        lambda c: TOKENS * c * size * (n + mixes) + n * _products(rows, c) * c * 2,
        lambda c: 2 * TOKENS * c * size * (n * mixes + reads) + 2 * TOKENS * c * 2 * split + tall * TOKENS * 4,
    )
    chunk, chunks = planned.chunk, width // planned.chunk // planned.splits
    products = _products(rows, chunk)
    held = tall <= 32  # coefficients in registers; else they are loaded for every chunk

    inputs = {"x": tk.padded(x), "gates": tk.tiled(jnp.concatenate(gates))}
    outputs: dict[str, jax.ShapeDtypeStruct] = {}
    if y is not None:
        inputs["y"] = tk.padded(y)
        outputs["between"] = jax.ShapeDtypeStruct(inputs["x"].shape, x.dtype)
    if reads:
        outputs["u"] = jax.ShapeDtypeStruct((tk.total(tokens), width), x.dtype)
    if phi is not None:
        inputs["phi"] = terms(phi, products)
        outputs["raw"] = jax.ShapeDtypeStruct((planned.splits, tk.count(tokens), TOKENS, products), jnp.float32)
        outputs["squares"] = jax.ShapeDtypeStruct((planned.splits, tk.count(tokens), TOKENS), jnp.float32)

    def body(refs):
        tile, part = jax.lax.axis_index("tile"), jax.lax.axis_index("part")
        first = tk.start(tile, tokens)

        def column(step, i):
            return i * width + (part * chunks + step) * chunk

        def columns(name, count):
            return [Tile(refs[name], (TOKENS, chunk), partial(lambda i, step: (first, column(step, i)), i)) for i in range(count)]

        loads, stores = {"x": columns("x", n)}, {}
        if mixes:
            loads["y"], stores["between"] = columns("y", 1), columns("between", n)
        if projects:
            loads["phi"] = [
                Tile(refs["phi"], (chunk, products), partial(lambda i, step: (column(step, i), 0), i), swizzle=2 * chunk) for i in range(n)
            ]
        if reads:
            stores["u"] = columns("u", 1)

        def scoped(gates_s, ready, halves=()):
            plgpu.copy_gmem_to_smem(refs["gates"].at[tile], gates_s, ready)
            plgpu.barrier_wait(ready)
            registers = [layout(gates_s[k], COLUMN, interpret) for k in range(tall)] if held else []

            def by(k, matrix):
                gate = registers[k] if held else layout(gates_s[k], COLUMN, interpret)
                return jax.lax.broadcast_in_dim(gate, matrix.shape, (0,)) * matrix

            def mixed(i, xs, ys):
                total = by(i, ys)
                for j in range(n):
                    if res is not None:
                        total = total + by(n + i * n + j, xs[j])
                    elif i == j:
                        total = total + xs[j]
                return total.astype(x.dtype)

            def project(raw, i, seen, value, loaded):
                if split:
                    for half in halves:
                        half[...] = value.astype(jnp.bfloat16)
                        value = value - value.astype(jnp.bfloat16).astype(jnp.float32)
                plgpu.commit_smem()
                for term in halves or [seen]:
                    plgpu.wgmma(raw, term, loaded["phi"][i])
                plgpu.wgmma_wait(0)

            def step(raw, _, loaded, stored, squares):
                out = stored() if stores else {}
                xs = [as_matrix(ref, interpret) for ref in loaded["x"]]
                ys = as_matrix(loaded["y"][0], interpret) if mixes else None
                u: Any = 0.0
                for i in range(n):
                    seen, value = loaded["x"][i], xs[i]
                    if mixes:
                        rounded = mixed(i, xs, ys)
                        seen, value = out["between"][i], rounded.astype(jnp.float32)
                        seen[...] = rounded
                    if projects:
                        squares = squares + jnp.sum(value * value, axis=1)
                        project(raw, i, seen, value, loaded)
                    if reads:
                        u = by(tall - n + i, value) + u
                if reads:
                    out["u"][0][...] = u.astype(x.dtype)
                return squares

            def run(raw=None):
                zero = layout(jnp.zeros((TOKENS,), jnp.float32), COLUMN, interpret) if projects else ()
                squares = pipeline(partial(step, raw), chunks, loads, stores, planned.stages, carry=zero)
                if projects:
                    refs["raw"][part, tile] = raw[...]
                    refs["squares"][part, tile] = squares

            if projects:
                pl.run_scoped(run, plgpu.ACC((TOKENS, products), jnp.float32))
            else:
                run()

        scratch = {"gates_s": plgpu.SMEM((tall, TOKENS), jnp.float32), "ready": plgpu.Barrier()}
        if split:
            scratch["halves"] = [shared((TOKENS, chunk), jnp.bfloat16)] * 2
        pl.run_scoped(scoped, **scratch)

    out = kernel(body, inputs, outputs, {"tile": tk.count(tokens), "part": planned.splits}, interpret=interpret)
    results: dict[str, jax.Array] = {name: out[name][:tokens] for name in ("between", "u") if name in out}
    if projects:
        raw, squares = out["raw"].sum(axis=0), out["squares"].sum(axis=0)
        raw = raw[:, :, :rows] + raw[:, :, rows : 2 * rows]
        results["sums"] = tk.untiled(jnp.concatenate([raw, squares[:, :, None]], axis=2).swapaxes(1, 2), tokens)
    return results
