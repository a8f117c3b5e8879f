"""The Kullback-Leibler divergence of a chunk of queries and its gradient with respect to the scores: what both losses have in common."""

import jax
import jax.numpy as jnp

Array = jax.Array


def divergence(p: Array, scores: Array) -> tuple[Array, Array]:
    """Sum over queries of KL(p / sum p || softmax(scores)) over the last axis, and its gradient with respect to the scores.

    Scores are -inf, and p is 0, where a key does not count. A query for which none does adds nothing.
    """
    total = p.sum(axis=-1, keepdims=True)
    p = p / jnp.where(total > 0, total, 1)
    top = scores.max(axis=-1, keepdims=True)
    shifted = scores - jnp.where(top > -jnp.inf, top, 0)
    softmax = jnp.exp(shifted)
    of_softmax = softmax.sum(axis=-1, keepdims=True)
    of_softmax = jnp.where(of_softmax > 0, of_softmax, 1)
    present = p > 0  # 0 log 0 = 0
    terms = jnp.where(present, p * (jnp.log(jnp.where(present, p, 1)) - shifted + jnp.log(of_softmax)), 0)
    return terms.sum(), softmax / of_softmax - p
