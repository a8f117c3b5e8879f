"""The stages of the backward kernel that have one number a token: gradients for the logits, and changes between two layouts.

Tokens lie on lanes where numbers are computed, and in h; they lie on sublanes where streams are mixed, every number spread over all lanes.
The matrix unit does these changes, as products with zeros and ones.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.mhc.tpu.backward_job import CONTRACT_LAST, NORM_ROWS, Coefficients, Job, Ref, dot, iota, terms, total
from pallas_kernels.mhc.tpu.tiles_backward import LANES


def reading(job: Job, products: list[jax.Array], h: Any) -> list[jax.Array]:
    """<d_u, x'_i> for every stream, [1, tokens] each, from the products with what x' is made of."""
    n = job.n
    if not job.post:
        return products
    streams, y = products[:n], products[n]
    mixed = streams
    if job.mixes:
        mixed = [total(h[2 * n + i * n + j : 2 * n + i * n + j + 1] * streams[j] for j in range(n)) for i in range(n)]
    return [m + h[n + i : n + i + 1] * y for i, m in enumerate(mixed)]


def scalars(job: Job, refs: dict[str, Ref], d_read: list[jax.Array], valid: jax.Array | None) -> None:
    """Gradients for the logits; g and the weight of x' in its own gradient, as the products of matrices want them."""
    n, rows = job.n, job.mapping.rows
    refs["d_logits"][...] = refs["d_logits_in"][:rows]
    if job.mapping.reads == "own":
        for i in range(n):
            refs["d_logits"][i : i + 1] += refs["d_logits_in"][rows + n + i : rows + n + i + 1] * d_read[i]
    z, inverse_rms = refs["saved"][:rows], refs["saved"][rows : rows + 1]
    dz = refs["gate"][...] * refs["d_logits"][...]
    norm = jnp.sum(dz * z, axis=0, keepdims=True) * inverse_rms * inverse_rms * (-1.0 / (n * job.width))
    g = inverse_rms * dz
    if valid is not None:
        g = jnp.where(valid, g, 0.0)
    stack = refs["g_terms"]
    stack[-NORM_ROWS:] = jnp.zeros((NORM_ROWS, norm.shape[1]), jnp.float32)
    if refs["g_columns"].dtype == jnp.float32:
        stack[:rows] = g
        stack[rows : rows + 1] = norm
        refs["g_rows"][...] = g
    else:  # high, high, middle, as phi has high, middle, high
        high, middle = terms(g, 2)
        for k, term in enumerate((high, high, middle)):
            stack[k * rows : (k + 1) * rows] = term
        for k, term in enumerate(terms(norm, 3)):
            stack[3 * rows + k : 3 * rows + k + 1] = term
        refs["g_rows"][...] = stack[rows : 3 * rows].astype(jnp.bfloat16)
    refs["g_columns"][...] = stack[...].T.astype(refs["g_columns"].dtype)


def spread(job: Job, refs: dict[str, Ref]) -> None:
    """Coefficients, tokens on lanes -> each over all lanes, tokens on sublanes; all but the one that the dot products decide.

    A product with zeros and ones: the cross-lane unit, the obvious one, takes twice as long. Three bfloat16 terms are float32.
    """
    rows = refs["coefficients"].shape[0]
    columns = jnp.concatenate(terms(refs["coefficients"][...], 3), axis=0).T.astype(jnp.bfloat16)
    for first in range(0, Coefficients(job).norm, 2):
        lanes = LANES * min(2, Coefficients(job).norm - first)
        select = iota((3 * rows, lanes), 0) % rows == first + iota((3 * rows, lanes), 1) // LANES
        blocks = dot(columns, select.astype(jnp.bfloat16), interpret=job.interpret)
        for k in range(lanes // LANES):
            _keep_spread(refs, first + k, blocks[:, k * LANES : (k + 1) * LANES])


def spread_norm(job: Job, refs: dict[str, Ref]) -> None:
    """The coefficient that the dot products decide: its terms are the last columns of g's."""
    columns = refs["g_columns"][...]
    first = columns.shape[1] - NORM_ROWS
    select = (iota((columns.shape[1], LANES), 0) >= first).astype(columns.dtype)
    _keep_spread(refs, Coefficients(job).norm, dot(columns, select, interpret=job.interpret))


def _keep_spread(refs: dict[str, Ref], k: int, block: jax.Array) -> None:
    refs["spread"][k] = block
    if "narrow" in refs:
        ref = refs["narrow"]
        ref[k] = jnp.concatenate([block.astype(ref.dtype)] * (ref.shape[-1] // LANES), axis=1)


def sum_of_lanes(block: jax.Array, interpret: bool) -> jax.Array:
    """[tokens, 128] -> [1, tokens], on the matrix unit: two bfloat16 terms leave 2^-17 of every summand."""
    ones = jnp.ones((16, LANES), jnp.bfloat16)
    return total(dot(ones, term.astype(jnp.bfloat16), CONTRACT_LAST, interpret) for term in terms(block, 2))[:1]


def diagonals(job: Job, gram: Ref) -> jax.Array:
    """Gram blocks -> [2 n (+ n * n), tokens], rows as h has them: <dx'_i, y> on those of post, <dx'_i, x_j> on those of res.

    The diagonals are picked by a product with zeros and ones, which leaves tokens on sublanes, and transposed.
    """
    n, size, tokens = job.n, job.tiles.gram, job.tiles.tokens
    streams = n if job.mixes else 0
    padded = gram.shape[-1]
    own = iota((size, padded), 0) == iota((size, padded), 1) % size
    picked = jnp.zeros((tokens, LANES), jnp.float32)
    for i in range(n):
        block = jnp.concatenate([jnp.where(own, gram[g, i * size : (i + 1) * size], 0.0) for g in range(tokens // size)], axis=0)
        stream, row = iota((padded, LANES), 0) // size, iota((padded, LANES), 1)
        place = jnp.where(stream < streams, 2 * n + i * n + stream, n + i)
        pick = ((row == place) & (stream <= streams)).astype(jnp.bfloat16)
        for term in terms(block, 2):
            picked += dot(term.astype(jnp.bfloat16), pick, interpret=job.interpret)
    return picked.T
