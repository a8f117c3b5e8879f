"""KromHC: H_res the Kronecker product of small doubly stochastic matrices, and so doubly stochastic to rounding.

    H_res = U_1 (x) ... (x) U_K,   U_k = sum_j a_kj P_j,   a_k = softmax(alpha_res phi_k v / rms(v) + b_k),   n = p_1 ... p_K

P_j are the p_k! permutation matrices of p_k; alpha_res is one for all factors. Source: arXiv 2601.21579 and its authors' code, whose
factors are all 2 x 2. As published: b_k is 0 for the identity and -8 for the others, phi 0, alpha 0.01. Assumed here: factors are the prime
factors of n, rising, so that n need be no power of two. Not as published: pre and post start as mHC's do (see `mhc_lite`).
"""

from functools import reduce

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mhc_jax.nn.residual.mhc_lite import combination, initial_logits
from mhc_jax.nn.residual.projected import Projected
from mhc_jax.residual_kinds import prime_factors


def kronecker(a: Float[Array, "n n T"], b: Float[Array, "m m T"]) -> Float[Array, "nm nm T"]:
    """The Kronecker product for every token."""
    size = len(a) * len(b)
    return (a[:, None, :, None] * b[None, :, None, :]).reshape(size, size, -1)


class KromHC(Projected):
    """KromHC. 2 n coefficients and p! for each prime factor p of n a token: 12 for 4 streams."""

    @staticmethod
    def res_bias(n: int) -> Float[Array, "R"]:
        return jnp.concatenate([jnp.zeros(0), *(initial_logits(p) for p in prime_factors(n))])

    def res(self, logits: Float[Array, "R T"]) -> Float[Array, "n n T"]:
        factors = prime_factors(self.streams)
        sizes = [len(initial_logits(p)) for p in factors]
        parts = jnp.split(logits, np.cumsum(sizes)[:-1]) if factors else []
        one = jnp.ones((1, 1, logits.shape[1]), logits.dtype)
        return reduce(kronecker, [combination(part, p) for part, p in zip(parts, factors)], one)
