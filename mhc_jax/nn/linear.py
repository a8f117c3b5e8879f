"""The product with a parameter matrix that projections and feed-forwards share. What is batched over experts or heads is not here."""

import math

from jaxtyping import Array, Float


def project(x: Float[Array, "... C"], weight: Float[Array, "C ..."]) -> Float[Array, "..."]:
    """x times the weight, in x's type: [*tokens, C] and [C, *out] give [*tokens, *out].

    All tokens are one axis of the product: with two, XLA:CPU makes the weight's gradient from a transposed copy of the cotangent, and
    forward and backward pass together take twice the time.
    """
    width = x.shape[-1]
    y = x.reshape(-1, width) @ weight.astype(x.dtype).reshape(width, math.prod(weight.shape[1:]))
    return y.reshape(*x.shape[:-1], *weight.shape[1:])
