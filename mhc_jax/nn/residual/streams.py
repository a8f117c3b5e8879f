"""n parallel residual streams, held flat: stream i is columns [i*C, (i+1)*C) of [..., n*C].

Coefficients have tokens last, packed as `pallas_kernels.mhc.Mapping` says: trailing axes of size n would be padded up to 64-fold on a TPU.
One orientation everywhere: x' = H_res x + post^T F(pre x), row i of H_res says how stream i is made.
"""

from functools import reduce
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from mhc_jax.nn.norm import wide
from pallas_kernels.mhc import Mapping


class Pending(NamedTuple):
    """What a sublayer leaves to be written: the next seam does it, together with its own read."""

    x: Float[Array, "B S nC"]  # the streams before the sublayer
    y: Float[Array, "B S C"]  # its output
    h: Float[Array, "K T"] | None  # its coefficients, float32 or wider; None: the plain residual, x + y


class Coefficients(NamedTuple):
    """The mappings of one sublayer."""

    pre: Float[Array, "n T"]
    post: Float[Array, "n T"]
    res: Float[Array, "n n T"] | None  # None: identity


def unpack(h: Float[Array, "K T"], mapping: Mapping) -> Coefficients:
    """The three mappings."""
    n = mapping.n
    return Coefficients(h[:n], h[n : 2 * n], h[2 * n :].reshape(n, n, -1) if mapping.mixes else None)


def unwritten(x: Float[Array, "B S nC"], mapping: Mapping | None) -> Pending:
    """Streams that wait for nothing: what the first seam of a network writes is x itself."""
    n = 1 if mapping is None else mapping.n
    y = jnp.zeros((*x.shape[:-1], x.shape[-1] // n), x.dtype)
    if mapping is None:
        return Pending(x, y, None)
    identity = [jnp.zeros(2 * n), jnp.eye(n).reshape(-1)] if mapping.mixes else [jnp.zeros(2 * n)]
    column = jnp.concatenate(identity).astype(wide(x).dtype)
    return Pending(x, y, jnp.broadcast_to(column[:, None], (mapping.rows, x.shape[0] * x.shape[1])))


def expand(x: Float[Array, "B S C"], n: int) -> Float[Array, "B S {n}*C"]:
    """n equal streams."""
    return jnp.tile(x, (1, 1, n))


def flat(x: Float[Array, "B S C"]) -> Float[Array, "T C"]:
    """Batch and positions as one axis of tokens."""
    return x.reshape(-1, x.shape[-1])


def split(x: Float[Array, "... nC"], n: int) -> list[Float[Array, "... C"]]:
    """The n streams."""
    return jnp.split(x, n, axis=-1)


def collapse(x: Float[Array, "B S nC"], weights: Float[Array, "n T"]) -> Float[Array, "B S C"]:
    """Weighted sum of the streams, in their type."""
    columns = weights.reshape(len(weights), *x.shape[:-1], 1)
    # One multiply-add a stream over whole streams: XLA fuses the chain, where a product with small matrices would run token by token.
    return reduce(jnp.add, [w * wide(s) for w, s in zip(columns, split(x, len(weights)))]).astype(x.dtype)
