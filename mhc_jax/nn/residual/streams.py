"""n parallel residual streams, held flat: stream i is columns [i*C, (i+1)*C) of [..., n*C].

Coefficients have tokens last ([n, T], [n, n, T]): trailing axes of size n would be padded up to 64-fold on a TPU.
One orientation everywhere: x' = H_res x + post^T F(pre x), row i of H_res says how stream i is made.
"""

from functools import reduce
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from mhc_jax.nn.norm import wide


class Coefficients(NamedTuple):
    """The mappings of one sublayer, float32 or wider; None stands for the plain residual's."""

    pre: Float[Array, "n T"] | None  # None: one stream, read as it is
    post: Float[Array, "n T"] | None  # None: one stream, written with weight 1
    res: Float[Array, "n n T"] | None  # None: identity
    logits: Float[Array, "n n T"] | None = None  # of H_res before Sinkhorn, where there are such


def expand(x: Float[Array, "B S C"], n: int) -> Float[Array, "B S {n}*C"]:
    """n equal streams."""
    return jnp.tile(x, (1, 1, n))


def split(x: Float[Array, "... nC"], n: int) -> list[Float[Array, "... C"]]:
    """The n streams."""
    return jnp.split(x, n, axis=-1)


def read(x: Float[Array, "B S nC"], coefficients: Coefficients) -> Float[Array, "B S C"]:
    """pre x: the sublayer's input, in x's type."""
    pre = coefficients.pre
    if pre is None:
        return x
    weights = pre.reshape(pre.shape[0], *x.shape[:-1], 1)
    return _weighted_sum(weights, [wide(s) for s in split(x, len(weights))]).astype(x.dtype)


def write(x: Float[Array, "B S nC"], y: Float[Array, "B S C"], coefficients: Coefficients) -> Float[Array, "B S nC"]:
    """H_res x + post^T y: the streams after a sublayer with output y, in x's type."""
    post, res = coefficients.post, coefficients.res
    if post is None:
        return x + y
    n = len(post)
    post = post.reshape(n, *x.shape[:-1], 1)
    streams = [wide(s) for s in split(x, n)]
    y = wide(y)
    if res is None:
        mixed = streams
    else:
        res = res.reshape(n, n, *x.shape[:-1], 1)
        mixed = [_weighted_sum(row, streams) for row in res]
    return jnp.concatenate([mixed[i] + post[i] * y for i in range(n)], axis=-1).astype(x.dtype)


def collapse(x: Float[Array, "B S nC"], weights: Float[Array, "n T"]) -> Float[Array, "B S C"]:
    """Weighted sum of the streams."""
    return read(x, Coefficients(weights, None, None))


def _weighted_sum(weights: Float[Array, "n *tokens 1"], streams: list[Float[Array, "*tokens C"]]) -> Float[Array, "*tokens C"]:
    # One multiply-add a stream over whole streams: XLA fuses the chain, where a product with [n, n] matrices would run token by token.
    return reduce(jnp.add, (w * s for w, s in zip(weights, streams)))
