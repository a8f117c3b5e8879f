"""The lightning indexer's projections (DeepSeek-V3.2, arXiv 2512.02556, Eq. 1). Scores, choice and losses: `pallas_kernels.indexer`."""

from typing import ClassVar

import jax.numpy as jnp
from jax import random
from jaxtyping import Array, Float, Int, PRNGKeyArray

from mhc_jax.config import ModelConfig
from mhc_jax.nn.linear import project
from mhc_jax.nn.module import Module, Spec, normal
from mhc_jax.nn.norm import layer_norm, wide, wide_dtype
from mhc_jax.nn.rotary import rotate

NORM_EPS = 1e-6  # of the keys' LayerNorm, as published


class Indexer(Module):
    """J query heads of I dimensions against one key: the score of key s for query t is sum_j weight[t, j] relu(q[t, j] . k[s]).

    The first `rope_dim` dimensions are rotated in halves, not in interleaved pairs as in the attention that it serves. The published
    Hadamard rotation of queries and keys is left out: it changes no score, and serves quantisation alone.
    """

    query: Float[Array, "Q J I"]  # from the normalised query latent of the attention
    key: Float[Array, "C I"]
    key_norm: Float[Array, "I"]  # LayerNorm, with a bias
    key_norm_bias: Float[Array, "I"]
    weight: Float[Array, "C J"]

    SPECS: ClassVar = {
        "query": Spec(("rank", "heads", None), decay=True),
        "key": Spec(("embed", None), decay=True),
        "key_norm": Spec((None,)),
        "key_norm_bias": Spec((None,)),
        "weight": Spec(("embed", "heads"), decay=True),
    }

    def __init__(self, config: ModelConfig, key: PRNGKeyArray):
        a, std = config.attention, config.init_std
        assert a.sparse is not None and a.q_rank is not None
        k_query, k_key, k_weight = random.split(key, 3)
        heads, dim = a.sparse.index_heads, a.sparse.index_dim
        self.query = normal(k_query, (a.q_rank, heads, dim), std)
        self.key = normal(k_key, (config.dim, dim), std)
        self.key_norm = jnp.ones(dim)
        self.key_norm_bias = jnp.zeros(dim)
        self.weight = normal(k_weight, (config.dim, heads), std)
        self.rope = a.rope
        self.rope_dim: int = a.rope_dim

    def queries(
        self, x: Float[Array, "B S C"], q_latent: Float[Array, "B S Q"], positions: Int[Array, "B S"]
    ) -> tuple[Float[Array, "B S J I"], Float[Array, "B S J"]]:
        """Queries, and the heads' weights with both scales in them, J^-0.5 and I^-0.5; these are float32 or wider."""
        q = self._rotated(project(q_latent, self.query), positions)
        weight = project(x.astype(wide_dtype(x)), self.weight)
        return q, weight * (q.shape[2] * q.shape[3]) ** -0.5

    def keys(self, x: Float[Array, "B S C"], positions: Int[Array, "B S"]) -> Float[Array, "B S I"]:
        """One key a token, shared by all heads: what decoding keeps."""
        k = layer_norm(wide(project(x, self.key)), self.key_norm, self.key_norm_bias, NORM_EPS)
        return self._rotated(k.astype(x.dtype), positions)

    def _rotated(self, x: Array, positions: Int[Array, "B S"]) -> Array:
        turned, still = jnp.split(x, [self.rope_dim], axis=-1)
        return jnp.concatenate([rotate(turned, positions, self.rope, interleaved=False), still], axis=-1)
