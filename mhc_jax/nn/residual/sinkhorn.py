"""Sinkhorn-Knopp: from a matrix of logits to a (nearly) doubly stochastic one (arXiv 2512.24880, Eq. 9)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def sinkhorn(logits: Float[Array, "n n *T"], steps: int = 20) -> Float[Array, "n n *T"]:
    """exp(logits), then `steps` times: columns to sum one, rows to sum one. Rows, normalised last, are exact to rounding.

    Differentiated as written, through all steps: the gradient of the exact fixed point is another one wherever 20 steps have not
    converged, which at n = 4 begins near a logit standard deviation of 2.

    Each column's largest logit is subtracted first. That changes nothing, because the first step divides each column by its sum, and
    keeps exp finite. Entries below the smallest positive number are raised to it, so that a vanishing row divides by more than zero.
    """
    top = jax.lax.stop_gradient(logits.max(axis=0, keepdims=True))
    start = jnp.maximum(jnp.exp(logits - top), jnp.finfo(logits.dtype).tiny)

    def step(m, _):
        m = m / m.sum(axis=0, keepdims=True)
        return m / m.sum(axis=1, keepdims=True), None

    return jax.lax.scan(step, start, length=steps)[0]
