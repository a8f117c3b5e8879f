"""DeepSeekMoE: which experts a token visits, and the layer that sends it there.

Sources: routing of DeepSeek-V3 (arXiv 2412.19437, Eq. 12-20): sigmoid affinities, a bias that steers selection and never weights, an
optional limit to the best groups; loss-free balancing (arXiv 2408.15664). The expert matrix products are in experts.py.
"""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from mhc_jax.config import ModelConfig, MoEConfig
from mhc_jax.nn.expert_parallel import routed
from mhc_jax.nn.ffn import SwiGLU
from mhc_jax.nn.module import Module, Spec, normal
from mhc_jax.nn.norm import wide
from mhc_jax.parallel.rules import Rules
from mhc_jax.parallel.shards import STREAMS, constrained, on_shards


class Routing(NamedTuple):
    """For each token the experts it visits and their weights."""

    experts: Int[Array, "*tokens k"]
    weights: Float[Array, "*tokens k"]  # sum to routed_scaling
    affinity: Float[Array, "*tokens E"]  # before the bias


def route(x: Float[Array, "*tokens C"], router: Float[Array, "C E"], bias: Float[Array, "E"], config: MoEConfig) -> Routing:
    """Chooses `top_k` experts a token, in float32 or wider.

    The bias is added for the choice alone: the weights are the chosen experts' own affinities over their sum, times `routed_scaling`.
    With groups, a group's score is the sum of its two best biased affinities, and only the best `top_groups` groups can be chosen.
    """
    affinity = jax.nn.sigmoid(jnp.matmul(wide(x), router, precision=jax.lax.Precision.HIGHEST))
    biased = jax.lax.stop_gradient(affinity) + jnp.expand_dims(bias, range(affinity.ndim - 1))
    if config.num_groups > 1:
        grouped = biased.reshape(*biased.shape[:-1], config.num_groups, -1)
        best_two = jax.lax.top_k(grouped, min(2, grouped.shape[-1]))[0].sum(axis=-1)
        chosen = jax.lax.top_k(best_two, config.top_groups)[1]
        allowed = jax.nn.one_hot(chosen, config.num_groups, dtype=bool).any(axis=-2)
        biased = jnp.where(allowed[..., None], grouped, -jnp.inf).reshape(biased.shape)
    experts = jax.lax.top_k(biased, config.top_k)[1]
    # The affinities of the chosen by a mask, not a gather of single numbers, which takes a TPU and its compiler long, as does its gradient.
    weights = jnp.where(jax.nn.one_hot(experts, config.num_experts, dtype=bool), affinity[..., None, :], 0).sum(axis=-1)
    weights = weights / weights.sum(axis=-1, keepdims=True) * config.routed_scaling
    return Routing(experts, weights, affinity)


def expert_load(experts: Int[Array, "*tokens k"], num_experts: int) -> Int[Array, "E"]:
    """Number of tokens that visit each expert."""
    return jax.nn.one_hot(experts, num_experts, dtype=jnp.int32).sum(axis=tuple(range(experts.ndim)))


def balance_loss(routing: Routing, sequences: int, config: MoEConfig) -> Float[Array, ""]:
    """Sequence-wise balance loss, alpha * sum_i f_i P_i averaged over sequences (arXiv 2412.19437, Eq. 17-20).

    f_i is expert i's share of the sequence's visits and P_i its share of the affinity, both scaled so that a perfectly balanced router
    gives exactly alpha.
    """
    experts = routing.experts.reshape(sequences, -1, config.top_k)
    length = experts.shape[1]
    visits = jax.nn.one_hot(experts, config.num_experts, dtype=routing.affinity.dtype).sum(axis=(1, 2))
    f = visits * (config.num_experts / (config.top_k * length))
    share = routing.affinity / routing.affinity.sum(axis=-1, keepdims=True)
    p = share.reshape(sequences, length, -1).mean(axis=1)
    return config.balance_loss * jnp.mean(jnp.sum(f * p, axis=-1))


def updated_bias(bias: Float[Array, "*L E"], load: Int[Array, "*L E"], rate: float) -> Float[Array, "*L E"]:
    """The selection bias after a step: up by `rate` for experts below the mean load, down above (arXiv 2408.15664, algorithm 1).

    `load` counts the whole batch, over all devices and microbatches.
    """
    load = load.astype(bias.dtype)
    return bias + rate * jnp.sign(load.mean(axis=-1, keepdims=True) - load)


class MoE(Module):
    """Shared experts that every token visits, held as one wide SwiGLU, and routed experts."""

    router: Float[Array, "C E"]
    inner: Float[Array, "E C 2*F"]
    out: Float[Array, "E F C"]
    shared: SwiGLU | None

    SPECS: ClassVar = {
        "router": Spec(("embed", None), decay=True),
        "inner": Spec(("experts", "embed", None), decay=True),
        "out": Spec(("experts", "expert_hidden", None), decay=True),
    }

    def __init__(self, config: ModelConfig, key: PRNGKeyArray):
        e, std = config.moe, config.init_std
        k_router, k_inner, k_out, k_shared = jax.random.split(key, 4)
        self.router = normal(k_router, (config.dim, e.num_experts), std)
        self.inner = normal(k_inner, (e.num_experts, config.dim, 2 * e.expert_dim), std)
        self.out = normal(k_out, (e.num_experts, e.expert_dim, config.dim), std)
        self.shared = SwiGLU(config.dim, e.shared_experts * e.expert_dim, std, k_shared) if e.shared_experts else None
        self.config: MoEConfig = e

    def __call__(
        self, x: Float[Array, "B S C"], bias: Float[Array, "E"], rules: Rules
    ) -> tuple[Float[Array, "B S C"], Int[Array, "E"], Float[Array, ""]]:
        """Layer output, tokens per expert over the whole batch, and the balance loss."""
        x = constrained(x, rules, *STREAMS)

        def choose(x: Array, router: Array, bias: Array) -> tuple[Array, ...]:
            return tuple(route(x, router, bias, self.config))

        # Per shard, because the partitioner would gather the affinities of the whole batch to find each token's best.
        chosen = on_shards(choose, rules, given=(STREAMS, None, None), results=(STREAMS,) * 3)(x, self.router, bias)
        routing = Routing(*chosen)
        y = routed(x, routing.experts, routing.weights, self.inner, self.out, rules)
        if self.shared is not None:
            y = y + constrained(self.shared(constrained(x, rules, "batch", "positions", None), rules), rules, *STREAMS)
        return y, expert_load(routing.experts, self.config.num_experts), balance_loss(routing, x.shape[0], self.config)
