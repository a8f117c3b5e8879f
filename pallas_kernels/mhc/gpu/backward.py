"""The kernel that streams backward: gradients of mixing, projection and reading in one pass, and of all coefficients.

One program is one warpgroup with some columns and all tokens of its part, tile after tile: so the gradient of phi, a sum over tokens,
stays in shared memory, and is written once for each part. Coefficients' gradients are sums over columns; each program writes its share.
Both are added up by XLA, in a fixed order.
"""

from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.launch import (
    COLUMN,
    MATRIX,
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
from pallas_kernels.mhc.gpu import forward
from pallas_kernels.mhc.gpu import tokens as tk


@dataclass(frozen=True)
class Plan:
    """Columns of a chunk, chunks of a program, pipeline stages, parts of the tokens, and what is projected, padded.

    `rows`: of g and phi, a multiple of the chunk, because both operands of a wgmma have rows of the same bytes. `wide`: columns of all n
    streams' chunks, a multiple of 64, the rows of a wgmma.
    """

    chunk: int
    chunks: int
    stages: int
    parts: int
    rows: int
    wide: int


def _plan(n: int, tokens: int, width: int, size: int, tall: int, streams: int, stored: int, rows: int, halves: int, sums: int) -> Plan:
    """The first of the chunk sizes, wide ones first, that leaves room for two stages; failing that the smallest, with one or even none."""
    options = []
    for chunk, chunks in [(64, 2), (64, 1), (32, 4), (32, 2), (32, 1), (16, 4), (16, 2), (16, 1)]:
        if (chunk == 64 and rows) or width % (chunk * chunks):
            continue
        padded, wide = -(-rows // chunk) * chunk, -(-n * chunk // 64) * 64
        stage = TOKENS * chunk * size * streams + tall * TOKENS * 4 + n * 2 * padded * chunk * 2 + TOKENS * 2 * padded * 2
        other = TOKENS * chunk * size * stored + halves * TOKENS * wide * 2 + (halves > 0) * chunks * wide * padded * 4 + sums * TOKENS * 4
        parts = max(1, min(tk.count(tokens), MULTIPROCESSORS // (width // chunk // chunks)))
        parts = -(-tk.count(tokens) // -(-tk.count(tokens) // parts))
        options.append(Plan(chunk, chunks, max(0, min(4, (SHARED_MEMORY - other) // stage)), parts, padded, wide))
    return next((option for option in options if option.stages >= 2), options[-1])


def stream(
    x: jax.Array,
    y: jax.Array | None,
    d_between: jax.Array | None,
    d_u: jax.Array | None,
    n: int,
    *,
    post: jax.Array | None = None,
    res: jax.Array | None = None,
    pre: jax.Array | None = None,
    phi: jax.Array | None = None,
    g: jax.Array | None = None,
    shrink: jax.Array | None = None,
    interpret: bool = False,
) -> dict[str, jax.Array]:
    """The transpose of `forward.stream`: x, y and coefficients as there, d_between [T, nC], d_u [T, C].

    phi [K, nC], g [K, T] and shrink [1, T], float32: the gradient for the mixed streams X' is d_between + pre d_u + phi^T g + shrink X'.
    Returns gradients: "x"; with post, "y" and "gates", of post and res [n + n*n or n, T]; with phi, "phi" = g X' [K, nC].
    """
    tokens, width = x.shape[0], x.shape[1] // n
    mixes, projects, reads = post is not None, phi is not None, d_u is not None
    if projects:
        check_wgmma(interpret)
    split = projects and x.dtype == jnp.float32  # float32 X' is multiplied in two terms
    rows = {name: a for name, a in {"post": post, "res": res, "pre": pre, "shrink": shrink}.items() if a is not None}
    at = dict(zip(rows, np.cumsum([0, *map(len, rows.values())]).tolist()))  # where they begin among the scalars
    scalars = jnp.concatenate([tk.tiled(jnp.concatenate([*rows.values()])), tk.first_time(tokens)], axis=1)
    tiles, tall, _ = scalars.shape
    many = n * (1 if res is None else 1 + n) if mixes else 0
    streams = n + mixes + n * (d_between is not None) + reads
    fixed = (n, tokens, width, x.dtype.itemsize, tall, streams, n + mixes, 0 if phi is None else phi.shape[0])
    plan = _plan(*fixed, projects * (1 + split), many)
    sums_phi = projects and plan.stages > 0
    if not plan.stages:  # float32 and many streams: no room for the gradient of phi
        plan = _plan(*fixed, 0, many)
    chunk, chunks, height, wide = plan.chunk, plan.chunks, plan.rows, plan.wide
    groups, each = width // chunk // chunks, -(-tiles // plan.parts)

    whole = {"x": x, "y": y, "d_between": d_between, "d_u": d_u}
    inputs = {name: tk.padded(a) for name, a in whole.items() if a is not None}
    inputs["scalars"] = scalars.reshape(tiles * tall, TOKENS)
    if phi is not None and g is not None:
        inputs["phi"] = _halves(phi, height)
        inputs["g"] = _halves(tk.tiled(g).swapaxes(0, 1).reshape(g.shape[0], -1), height).T
    outputs = {"dx": jax.ShapeDtypeStruct(inputs["x"].shape, x.dtype)}
    if mixes:
        outputs["dy"] = jax.ShapeDtypeStruct((tk.total(tokens), width), x.dtype)
        outputs["gates"] = jax.ShapeDtypeStruct((groups, tiles, many, TOKENS), jnp.float32)
    if sums_phi:
        outputs["d_phi"] = jax.ShapeDtypeStruct((plan.parts, groups * chunks, wide, height), jnp.float32)

    def body(refs):
        group, part = jax.lax.axis_index("group"), jax.lax.axis_index("part")

        def tile_of(step):
            return jnp.minimum(part * each + step // chunks, tiles - 1)

        def column(step, i):
            return i * width + (group * chunks + step % chunks) * chunk

        def columns(name, count):
            return [
                Tile(refs[name], (TOKENS, chunk), partial(lambda i, step: (tk.start(tile_of(step), tokens), column(step, i)), i))
                for i in range(count)
            ]

        loads = {name: columns(name, a.shape[1] // width) for name, a in whole.items() if a is not None}
        loads["scalars"] = [Tile(refs["scalars"], (tall, TOKENS), lambda step: (tile_of(step) * tall, 0), swizzle=0)]
        if projects:
            loads["g"] = [Tile(refs["g"], (TOKENS, 2 * height), lambda step: (tile_of(step) * TOKENS, 0), swizzle=2 * chunk)]
            loads["phi"] = [
                Tile(refs["phi"], (2 * height, chunk), partial(lambda i, step: (0, column(step, i)), i), swizzle=2 * chunk)
                for i in range(n)
            ]
        stores = {"dx": columns("dx", n)} | ({"dy": columns("dy", 1)} if mixes else {})

        def scoped(sums=None, halves=(), d_phi=None):
            if sums_phi:
                for k in range(chunks):
                    d_phi[k] = layout(jnp.zeros((wide, height), jnp.float32), MATRIX, interpret)
                if wide > n * chunk:  # what no stream fills must be finite
                    for half in halves:
                        half[...] = layout(jnp.zeros(half.shape, jnp.bfloat16), MATRIX, interpret)

            def step(index, loaded, stored, _):
                sub = index % chunks
                own = (part * each + index // chunks < tiles).astype(jnp.float32)  # a part may end in tiles that are not its own

                def value(name, i=0):
                    return as_matrix(loaded[name][i], interpret)

                def by(k, matrix):
                    return jax.lax.broadcast_in_dim(layout(loaded["scalars"][0][k], COLUMN, interpret), matrix.shape, (0,)) * matrix

                def half_of_g(k):
                    return loaded["g"][0].at[:, pl.ds(k * height, height)]

                def add(k, products):
                    before = jnp.where(sub == 0, 0.0, layout(sums[k], COLUMN, interpret))
                    sums[k] = before + jnp.sum(products, axis=1)

                def mixed(i):
                    if not mixes:
                        return value("x", i)
                    total = by(at["post"] + i, value("y"))
                    for j in range(n):
                        if res is not None:
                            total = total + by(at["res"] + i * n + j, value("x", j))
                        elif i == j:
                            total = total + value("x", j)
                    return total.astype(x.dtype).astype(jnp.float32)

                def through_phi(i, acc):
                    for a, b in ((0, 0), (1, 0), (0, 1)):
                        plgpu.wgmma(acc, half_of_g(a), loaded["phi"][i].at[pl.ds(b * height, height)])
                    return acc[...]

                def of_phi(m, acc):
                    for half in halves:
                        for k in range(2):
                            plgpu.wgmma(acc, _rows_of(half, m, interpret), half_of_g(k))
                    return acc[...]

                def gradient(i):
                    terms = [value("d_between", i)] if d_between is not None else []
                    if reads:
                        terms.append(by(at["pre"] + i, value("d_u")))
                    if projects:
                        seen = mixed(i)
                        terms.append(by(at["shrink"], seen))
                        seen = by(tall - 1, seen) * own
                        for half in halves:
                            rounded = seen.astype(jnp.bfloat16)
                            _put(half, i * chunk, rounded, interpret)
                            seen = seen - rounded.astype(jnp.float32)
                        terms.append(pl.run_scoped(partial(through_phi, i), plgpu.ACC((TOKENS, chunk), jnp.float32)))
                    return reduce(jnp.add, terms)

                dx: list[Any] = [0.0] * n
                dy: Any = 0.0
                for i in range(n):
                    d = gradient(i)
                    if mixes:
                        dy = by(at["post"] + i, d) + dy
                        add(i, d * value("y"))
                    for j in range(n):
                        if res is not None:
                            dx[j] = by(at["res"] + i * n + j, d) + dx[j]
                            add(n + i * n + j, d * value("x", j))
                        elif i == j:
                            dx[j] = d
                if sums_phi:
                    plgpu.commit_smem()
                    for m in range(wide // 64):
                        here = (sub, pl.ds(m * 64, 64))
                        more = pl.run_scoped(partial(of_phi, m), plgpu.ACC((64, height), jnp.float32))
                        d_phi[here] = layout(d_phi[here], MATRIX, interpret) + more
                out = stored()
                for j in range(n):
                    out["dx"][j][...] = dx[j].astype(x.dtype)
                if mixes:
                    out["dy"][0][...] = dy.astype(x.dtype)

                    @pl.when(sub == chunks - 1)
                    def _():
                        for k in range(many):
                            refs["gates"][group, tile_of(index), k] = layout(sums[k], COLUMN, interpret)

                return ()

            pipeline(step, each * chunks, loads, stores, plan.stages, slots=1)
            if sums_phi:
                plgpu.commit_smem()
                for k in range(chunks):
                    plgpu.copy_smem_to_gmem(d_phi.at[k], refs["d_phi"].at[part, group * chunks + k])
                plgpu.wait_smem_to_gmem(0)

        scratch: dict[str, Any] = {}
        if mixes:
            scratch["sums"] = plgpu.SMEM((many, TOKENS), jnp.float32)
        if sums_phi:
            shape = (wide, TOKENS) if interpret else (TOKENS, wide)
            scratch["halves"] = [shared(shape, jnp.bfloat16, 2 * chunk)] * (1 + split)
            scratch["d_phi"] = shared((chunks, wide, height), jnp.float32)
        pl.run_scoped(scoped, **scratch)

    out = kernel(body, inputs, outputs, {"group": groups, "part": plan.parts}, interpret=interpret)
    results = {"x": out["dx"][:tokens]}
    if mixes:
        results |= {"y": out["dy"][:tokens], "gates": tk.untiled(out["gates"].sum(axis=0), tokens)}
    if sums_phi:
        d_phi = out["d_phi"].sum(axis=0)[:, : n * chunk].reshape(width // chunk, n, chunk, height)
        results["phi"] = d_phi.transpose(3, 1, 0, 2).reshape(height, n * width)[: fixed[-1]]
    elif g is not None:
        seen = forward.stream(x, y, n, post=post, res=res, interpret=interpret)["between"] if mixes else x
        results["phi"] = jnp.dot(g, seen.astype(jnp.float32), precision="highest")
    return results


def _halves(x: jax.Array, rows: int) -> jax.Array:
    """[K, D] float32 -> [2 rows, D] bfloat16: the leading term and the next, each padded with rows of zeros."""
    x = jnp.pad(x, ((0, rows - x.shape[0]), (0, 0)))
    high = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return jnp.concatenate([high, x - high]).astype(jnp.bfloat16)


def _put(buffer, start: int, block: jax.Array, interpret: bool) -> None:
    """Writes [64, chunk] to columns of X'. The interpreter of jax 0.10 multiplies no transposed memory, so there X' lies transposed."""
    if interpret:
        buffer[pl.ds(start, block.shape[1])] = block.T
    else:
        buffer[:, pl.ds(start, block.shape[1])] = block


def _rows_of(buffer, m: int, interpret: bool):
    """The m-th 64 columns of X', as rows."""
    return buffer.at[pl.ds(m * 64, 64)] if interpret else buffer.at[:, pl.ds(m * 64, 64)].transpose((1, 0))
