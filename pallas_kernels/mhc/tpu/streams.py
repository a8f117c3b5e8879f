"""What a forward kernel does with the streams of one tile of tokens: mix them, project them, read them. Coefficients come from elsewhere.

Two layouts of coefficients meet here. Gates want tokens on lanes, so that a plane of tokens fills registers; streams have tokens on
sublanes, so there a coefficient is a column that is broadcast over lanes.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from pallas_kernels.mhc.spec import Mapping
from pallas_kernels.tpu.tiles import LANES, round_up

Ref = Any


@dataclass(frozen=True)
class Shape:
    """Sizes of one kernel: n streams of `width` lanes, `tokens` to a tile, `rows` to a token's coefficients (a multiple of 8)."""

    mapping: Mapping
    width: int
    tokens: int
    rows: int
    group: int  # tokens that one step of a loop over the streams takes
    unroll: int  # such steps in a row
    lanes: int  # lanes of one product of matrices
    terms: int  # bfloat16 terms of h in products of matrices; 0: mix with vector instructions
    block: int  # tokens that are projected at once
    compact: bool = False  # short code, slow

    @property
    def chunks(self) -> int:
        """Blocks of 128 tokens."""
        return self.tokens // LANES


def mix(shape: Shape, x: Ref, y: Ref, columns: Ref, between: Ref, squares: Ref) -> None:
    """x'_i = sum_j res_ij x_j + post_i y for a tile, in float32; and 128 partial sums of a token's squares of x'."""
    n, width = shape.mapping.n, shape.width

    def step(tokens, spread):
        post, res = spread[:n], spread[n:]

        def lanes(at, total):
            streams = [_load(x, tokens, i * width + at) for i in range(n)]
            added = _load(y, tokens, at)
            for i in range(n):
                kept = _dot(res[i * n : (i + 1) * n], streams) if res else streams[i]
                mixed = (kept + post[i] * added).astype(between.dtype)
                _store(between, tokens, i * width + at, mixed)
                total += jnp.square(mixed.astype(jnp.float32))
            return total

        squares[tokens, :] = _over_lanes(shape, lanes, _zeros(shape))

    _by_group(shape, columns, range(n, shape.mapping.rows), step)


def mix_on_mxu(shape: Shape, x: Ref, y: Ref, diagonals: Ref, between: Ref, squares: Ref) -> None:
    """As `mix`, by products of block-diagonal matrices with a group's streams and y, one below the other."""
    n, group, width = shape.mapping.n, shape.group, shape.width

    def step(index, carry):
        tokens = _tokens(shape, index)
        left = diagonals[index].astype(jnp.bfloat16)
        total = _zeros(shape)
        for at in range(0, width, shape.lanes):
            right = [x[tokens, i * width + at : i * width + at + shape.lanes] for i in range(n)] + [y[tokens, at : at + shape.lanes]]
            stacked = jnp.concatenate(right * shape.terms, axis=0)
            mixed = jnp.dot(left[:, : stacked.shape[0]], stacked, preferred_element_type=jnp.float32)
            for i in range(n):
                part = mixed[i * group : (i + 1) * group].astype(between.dtype)
                between[tokens, i * width + at : i * width + at + shape.lanes] = part
                for lane in range(0, shape.lanes, LANES):
                    total += jnp.square(part[:, lane : lane + LANES].astype(jnp.float32))
        squares[tokens, :] = total
        return carry

    jax.lax.fori_loop(0, shape.tokens // group, step, None, unroll=shape.unroll)


def read(shape: Shape, x: Ref, columns: Ref, u: Ref) -> None:
    """u = sum_i pre_i x_i for a tile, in float32."""
    n = shape.mapping.n

    def step(tokens, pre):
        for at in range(0, shape.width, LANES):
            _store(u, tokens, at, _dot(pre, [_load(x, tokens, i * shape.width + at) for i in range(n)]))

    _by_group(shape, columns, range(n), step)


def square(shape: Shape, x: Ref, squares: Ref) -> None:
    """128 partial sums of a token's squares, over all streams."""

    def step(index, carry):
        tokens = _tokens(shape, index)
        total = _zeros(shape)
        for at in range(0, shape.mapping.n * shape.width, LANES):
            total += jnp.square(_load(x, tokens, at))
        squares[tokens, :] = total
        return carry

    jax.lax.fori_loop(0, shape.tokens // shape.group, step, None, unroll=shape.unroll)


def project(shape: Shape, x: Ref, phi: Ref, squares: Ref, planes: Ref, saved: Ref) -> None:
    """z = phi x / rms(x): into the rows of `planes` that chunk by chunk hold 128 tokens, and with the inverse rms into `saved`.

    phi is [rows, n * width] float32, or [2 rows, n * width] bfloat16: the upper and the middle bits of it.
    """
    mapping, rows = shape.mapping, shape.rows
    depth, block = mapping.n * shape.width, shape.block
    wide = phi.dtype == jnp.float32

    def step(index, carry):
        tokens = pl.ds(pl.multiple_of(index * block, block), block)
        raw = jax.lax.dot_general(
            phi[:, :],
            x[tokens, :],
            (((1,), (1,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST if wide else jax.lax.Precision.DEFAULT,
            preferred_element_type=jnp.float32,
        )
        if not wide:
            raw = raw[:rows] + raw[rows:]
        mean = jnp.sum(squares[tokens, :].T, axis=0, keepdims=True) * (1 / depth)
        inverse_rms = jax.lax.rsqrt(mean + mapping.norm_eps)
        z = raw * inverse_rms
        for c in range(block // LANES):
            at = pl.multiple_of((index * (block // LANES) + c) * rows, 8)
            planes[pl.ds(at, rows), :] = z[:, c * LANES : (c + 1) * LANES]
        saved[: mapping.rows, tokens] = z[: mapping.rows]
        saved[mapping.rows :, tokens] = inverse_rms
        return carry

    jax.lax.fori_loop(0, shape.tokens // block, step, None)


def to_planes(shape: Shape, h: Ref, planes: Ref) -> None:
    """h [K, tokens] -> the rows of `planes`."""
    pad = jnp.zeros((shape.rows - shape.mapping.rows, LANES), jnp.float32)
    for c in range(shape.chunks):
        last = c * shape.rows + shape.mapping.rows
        planes[c * shape.rows : last, :] = h[:, c * LANES : (c + 1) * LANES]
        if pad.shape[0]:  # a product with zeros needs numbers there
            planes[last : (c + 1) * shape.rows, :] = pad


def from_planes(shape: Shape, planes: Ref, h: Ref) -> None:
    """The rows of `planes` -> h [K, tokens]."""
    for c in range(shape.chunks):
        h[:, c * LANES : (c + 1) * LANES] = planes[c * shape.rows : c * shape.rows + shape.mapping.rows, :]


def to_columns(shape: Shape, planes: Ref, columns: Ref) -> None:
    """The rows of `planes` -> columns [tokens, rows]."""
    for c in range(shape.chunks):
        columns[c * LANES : (c + 1) * LANES, : shape.rows] = planes[c * shape.rows : (c + 1) * shape.rows, :].T


def to_diagonals(shape: Shape, planes: Ref, spread: Ref, diagonals: Ref) -> None:
    """The rows of `planes` -> what `mix_on_mxu` multiplies with, [groups, n * group, ...]: its blocks [group, group] are diagonal.

    A product with `spread`, zeros and ones, copies every coefficient, split into bfloat16 terms, over the lanes of its block; then what is
    off the diagonals is cut away.
    """
    n, group = shape.mapping.n, shape.group
    lanes, groups = spread.shape[1] // n, LANES // group
    token = jax.lax.broadcasted_iota(jnp.int32, (LANES, lanes), 0) % group
    lane = jax.lax.broadcasted_iota(jnp.int32, (LANES, lanes), 1) % group

    def chunk(index, carry):
        rest = planes[pl.ds(pl.multiple_of(index * shape.rows, 8), shape.rows), :]
        terms = []
        for _term in range(shape.terms):
            terms.append(rest.astype(jnp.bfloat16).astype(jnp.float32))
            rest = rest - terms[-1]
        columns = jnp.concatenate(terms, axis=0).T.astype(jnp.bfloat16)
        for i in range(n):
            block = jnp.dot(columns, spread[:, i * lanes : (i + 1) * lanes], preferred_element_type=jnp.float32)
            block = jnp.where(token == lane, block, 0.0)
            diagonals[pl.ds(index * groups, groups), i * group : (i + 1) * group, :] = block.reshape(groups, group, lanes)
        return carry

    jax.lax.fori_loop(0, shape.chunks, chunk, None)


def spread_matrix(shape: Shape) -> np.ndarray:
    """[terms * rows, n * lanes] of zeros and ones: from (term, coefficient) to, for every stream, (term, column of res or post, token)."""
    n, group, terms = shape.mapping.n, shape.group, shape.terms
    lanes = round_up(terms * (n + 1) * group, LANES)
    matrix = np.zeros((terms, shape.rows, n, lanes), np.float32)
    for term in range(terms):
        for i in range(n):
            for j in range(n + 1):
                k = n + i if j == n else 2 * n + i * n + j
                at = (term * (n + 1) + j) * group
                matrix[term, k, i, at : at + group] = 1
    return matrix.reshape(terms * shape.rows, n * lanes)


def _by_group(shape: Shape, columns: Ref, rows: range, step: Any) -> None:
    """Calls step(tokens, `rows` of their coefficients, each over 128 lanes) for every group of a tile.

    Broadcasting over lanes has a latency of some hundred cycles, so a step's are made while the one before computes.
    """
    groups = shape.tokens // shape.group

    def spread(index):
        block = columns[_tokens(shape, index), :]
        return [jnp.broadcast_to(block[:, k : k + 1], (shape.group, LANES)) for k in rows]

    def body(index, ready):
        following = spread(jnp.minimum(index + 1, groups - 1))
        step(_tokens(shape, index), ready)
        return following

    jax.lax.fori_loop(0, groups, body, spread(0), unroll=shape.unroll)


def _over_lanes(shape: Shape, body: Any, carry: jax.Array) -> jax.Array:
    """body(first lane, carry) for every 128 lanes of a stream: in a row, as constant addresses cost nothing; compact, in a loop."""
    if shape.compact:
        return jax.lax.fori_loop(0, shape.width // LANES, lambda i, carry: body(i * LANES, carry), carry)
    for at in range(0, shape.width, LANES):
        carry = body(at, carry)
    return carry


def _tokens(shape: Shape, index: Any) -> Any:
    return pl.ds(pl.multiple_of(index * shape.group, shape.group), shape.group)


def _zeros(shape: Shape) -> jax.Array:
    return jnp.zeros((shape.group, LANES), jnp.float32)


def _load(ref: Ref, tokens: Any, at: Any) -> jax.Array:
    return ref[tokens, pl.ds(_aligned(at), LANES)].astype(jnp.float32)


def _store(ref: Ref, tokens: Any, at: Any, value: jax.Array) -> None:
    ref[tokens, pl.ds(_aligned(at), LANES)] = value.astype(ref.dtype)


def _aligned(at: Any) -> Any:
    return at if isinstance(at, int) else pl.multiple_of(at, LANES)


def _dot(a: list[jax.Array], b: list[jax.Array]) -> jax.Array:
    total = a[0] * b[0]
    for p, q in zip(a[1:], b[1:]):
        total += p * q
    return total
