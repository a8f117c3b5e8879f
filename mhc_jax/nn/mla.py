"""Multi-head latent attention (MLA) in its training form: keys and values expanded from a shared latent.

Source: DeepSeek-V2 (arXiv 2405.04434, Eq. 9-19), with the order of norms and splits of the DeepSeek-V3 inference code.
"""

from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from mhc_jax.config import AttentionConfig, ModelConfig
from mhc_jax.nn.linear import project
from mhc_jax.nn.module import Module, Spec, normal
from mhc_jax.nn.norm import rms_norm
from mhc_jax.nn.rotary import rotate, softmax_temperature
from mhc_jax.parallel.rules import Rules
from mhc_jax.parallel.shards import on_token_shards
from pallas_kernels.attention import dense_attention
from pallas_kernels.visible import causal_span


class MLA(Module):
    """Projections of latent attention; H heads of D unrotated, R rotated and V value dimensions, latents of K (and Q) dimensions."""

    query: Float[Array, "C H D+R"] | None  # full-rank queries, or
    query_down: Float[Array, "C Q"] | None  # queries through a latent
    query_norm: Float[Array, "Q"] | None
    query_up: Float[Array, "Q H D+R"] | None
    latent: Float[Array, "C K+R"]  # key-value latent, and the rotated key shared by all heads
    latent_norm: Float[Array, "K"]
    expand: Float[Array, "K H D+V"]  # latent to keys and values
    out: Float[Array, "H V C"]
    qk_scales: Float[Array, "2 D+R"] | None  # weights of the optional query and key norms

    SPECS: ClassVar = {
        "query": Spec(("embed", "heads", None), decay=True),
        "query_down": Spec(("embed", None), decay=True),
        "query_norm": Spec((None,)),
        "query_up": Spec((None, "heads", None), decay=True),
        "latent": Spec(("embed", None), decay=True),
        "latent_norm": Spec((None,)),
        "expand": Spec((None, "heads", None), decay=True),
        "out": Spec(("heads", None, "embed"), decay=True),
        "qk_scales": Spec((None, None)),
    }

    def __init__(self, config: ModelConfig, key: PRNGKeyArray):
        a, std = config.attention, config.init_std
        k_q, k_q2, k_latent, k_expand, k_out = jax.random.split(key, 5)
        head = a.nope_dim + a.rope_dim
        rank = a.q_rank
        self.query = normal(k_q, (config.dim, a.num_heads, head), std) if rank is None else None
        self.query_down = None if rank is None else normal(k_q, (config.dim, rank), std)
        self.query_norm = None if rank is None else jnp.ones(rank)
        self.query_up = None if rank is None else normal(k_q2, (rank, a.num_heads, head), std)
        self.latent = normal(k_latent, (config.dim, a.kv_rank + a.rope_dim), std)
        self.latent_norm = jnp.ones(a.kv_rank)
        self.expand = normal(k_expand, (a.kv_rank, a.num_heads, a.nope_dim + a.value_dim), std)
        self.out = normal(k_out, (a.num_heads, a.value_dim, config.dim), std)
        self.qk_scales = jnp.ones((2, head)) if a.qk_norm else None
        self.config: AttentionConfig = a
        self.norm_eps: float = config.norm_eps

    def __call__(
        self, x: Float[Array, "B S C"], positions: Int[Array, "B S"], segment_ids: Int[Array, "B S"]
    ) -> tuple[Float[Array, "B S C"], Float[Array, ""]]:
        """Attention output, and the largest attention logit (no gradient)."""
        a, eps = self.config, self.norm_eps
        if self.query is not None:
            q = project(x, self.query)
        else:
            assert self.query_down is not None and self.query_up is not None
            q_latent = rms_norm(project(x, self.query_down), self.query_norm, eps)
            q = project(q_latent, self.query_up)
        q_nope, q_rope = jnp.split(q, [a.nope_dim], axis=-1)

        latent, k_rope = jnp.split(project(x, self.latent), [a.kv_rank], axis=-1)
        latent = rms_norm(latent, self.latent_norm, eps)
        k_nope, value = jnp.split(project(latent, self.expand), [a.nope_dim], axis=-1)

        if self.qk_scales is not None:
            # The two parts are normalised apart, so that the rotated key stays shared by all heads.
            (q_nope_scale, k_nope_scale), (q_rope_scale, k_rope_scale) = jnp.split(self.qk_scales, [a.nope_dim], axis=-1)
            q_nope, k_nope = rms_norm(q_nope, q_nope_scale, eps), rms_norm(k_nope, k_nope_scale, eps)
            q_rope, k_rope = rms_norm(q_rope, q_rope_scale, eps), rms_norm(k_rope, k_rope_scale, eps)

        attend = partial(dense_attention, scale=(a.nope_dim + a.rope_dim) ** -0.5 * softmax_temperature(a.rope), query_block=a.query_block)
        heads_first = (y.swapaxes(1, 2) for y in (q_nope, rotate(q_rope, positions, a.rope), k_nope, value))
        q_nope, q_rope, k_nope, value = heads_first
        args = (q_nope, q_rope, k_nope, rotate(k_rope, positions, a.rope), value, causal_span(segment_ids).first)
        attended, _, top = on_token_shards(lambda *args: tuple(attend(*args)), Rules(), tokens=(0,) * 6, results=(0, 0, 0))(*args)
        attended, largest = attended.swapaxes(1, 2), top.max()
        return project(attended.reshape(*x.shape[:-1], -1), self.out.reshape(-1, x.shape[-1])), largest
