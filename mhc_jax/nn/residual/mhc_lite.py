"""mHC-lite: H_res a convex combination of all permutation matrices, and so doubly stochastic to rounding, without iterations.

    H_res = sum_k a_k P_k,   a = softmax(alpha_res phi_res v / rms(v) + b_res),   P_k the n! permutation matrices

Source: arXiv 2601.05732 (Birkhoff-von-Neumann). As published: b_res is 0 for the identity and -8 for the others, phi 0, alpha 0.01. Not as
published: the paper's code starts pre and post at logits of +1 on one stream and -1 on the others, which is no pre-norm network; here they
start as mHC's do (`mhc_jax.nn.residual.mhc`). Its code applies H_res transposed, which renames the P_k and changes nothing else.
"""

from itertools import permutations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mhc_jax.nn.residual.projected import Projected

OTHERS = -8.0  # initial logit of every permutation but the identity, whose is 0


def initial_logits(n: int) -> Float[Array, "R"]:
    """The identity, which is the first permutation, favoured."""
    return jnp.where(jnp.arange(len(_matrices(n))) == 0, 0.0, OTHERS)


def combination(logits: Float[Array, "R T"], n: int) -> Float[Array, "n n T"]:
    """The sum of all permutation matrices, in the order of `itertools.permutations`, weighted by the softmax of the logits."""
    weights = jax.nn.softmax(logits, axis=0)
    return jnp.einsum("kij,kt->ijt", jnp.asarray(_matrices(n), weights.dtype), weights, precision=jax.lax.Precision.HIGHEST)


def _matrices(n: int) -> Float[np.ndarray, "R n n"]:
    return np.eye(n)[list(permutations(range(n)))]


class MHCLite(Projected):
    """mHC-lite. n! + 2 n coefficients a token: 32 for 4 streams."""

    @staticmethod
    def res_bias(n: int) -> Float[Array, "R"]:
        return initial_logits(n)

    def res(self, logits: Float[Array, "R T"]) -> Float[Array, "n n T"]:
        return combination(logits, self.streams)
