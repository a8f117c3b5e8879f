"""The network: embedding, layers of two sublayers joined by residual connections, collapse, norm, head.

    embed -> n equal streams -> per sublayer: read -> norm -> attention or feed-forward -> write -> ... -> collapse -> norm -> logits

Layers of one kind are stacked along axis 0 and run under `jax.lax.scan`. A sublayer never knows how many streams there are; a connection
never knows what the sublayer is.
"""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from mhc_jax.config import ModelConfig
from mhc_jax.nn.ffn import SwiGLU
from mhc_jax.nn.loss import next_token_loss
from mhc_jax.nn.mla import MLA
from mhc_jax.nn.module import Module, Spec, normal
from mhc_jax.nn.moe import MoE
from mhc_jax.nn.norm import inverse_rms, rms_norm, wide, wide_dtype
from mhc_jax.nn.remat import remat
from mhc_jax.nn.residual.hc import HC, StaticHC
from mhc_jax.nn.residual.mhc import MHC, IdentityHC, pre_bias, projected
from mhc_jax.nn.residual.socket import Connection, PlainResidual
from mhc_jax.nn.residual.streams import Coefficients, collapse, expand, read, split, write
from mhc_jax.parallel.rules import Rules

CONNECTIONS: dict[str, type[Connection]] = {
    "residual": PlainResidual,
    "hc": HC,
    "static_hc": StaticHC,
    "mhc": MHC,
    "identity_hc": IdentityHC,
}


class SublayerTrace(NamedTuple):
    """What a connection did to the first sequence of the batch; n streams, S tokens."""

    pre: Float[Array, "n S"]
    post: Float[Array, "n S"]
    res: Float[Array, "n n S"]
    logit_std: Float[Array, ""]  # of H_res before Sinkhorn; NaN where there are no logits
    stream_rms: Float[Array, "n"]  # before the sublayer
    stream_cosine: Float[Array, ""]  # mean over pairs of different streams and tokens; 1 for one stream


class LayerAux(NamedTuple):
    """What a layer reports beside its output. Stacked over layers by the scan."""

    max_attention_logit: Float[Array, ""]
    expert_load: Int[Array, "E"]  # tokens per expert over the whole batch; zeros in a dense layer
    balance_loss: Float[Array, ""]
    trace: tuple[SublayerTrace, SublayerTrace] | None  # attention, feed-forward; None unless asked for


class Aux(NamedTuple):
    """What the network reports beside its output."""

    max_attention_logit: Float[Array, "L"]
    expert_load: Int[Array, "L_moe E"]
    balance_loss: Float[Array, ""]  # summed over layers
    trace: SublayerTrace | None  # arrays stacked over 2 * L sublayers; None unless asked for
    final_stream_rms: Float[Array, "n"]
    final_stream_cosine: Float[Array, ""]


class Layer(Module):
    """Two sublayers, attention and feed-forward, each with its own connection and norm."""

    attention_connection: Connection
    attention_norm: Float[Array, "C"]
    attention: MLA
    ffn_connection: Connection
    ffn_norm: Float[Array, "C"]
    ffn: SwiGLU | MoE

    SPECS: ClassVar = {"attention_norm": Spec((None,)), "ffn_norm": Spec((None,))}

    def __init__(self, config: ModelConfig, index: Int[Array, ""], key: PRNGKeyArray, dense: bool):
        k_attention, k_ffn, k_connection = jax.random.split(key, 3)
        connection = CONNECTIONS[config.residual]
        k_first, k_second = jax.random.split(k_connection)
        self.attention_connection = connection(config, 2 * index, k_first)
        self.attention_norm = jnp.ones(config.dim)
        self.attention = MLA(config, k_attention)
        self.ffn_connection = connection(config, 2 * index + 1, k_second)
        self.ffn_norm = jnp.ones(config.dim)
        self.ffn = SwiGLU(config.dim, config.dense_dim, config.init_std, k_ffn) if dense else MoE(config, k_ffn)


class Head(Module):
    """V4's learned collapse: sigmoid weights predicted from all streams (DeepSeek-V4, arXiv 2606.19348)."""

    phi: Float[Array, "n n*C"]
    bias: Float[Array, "n"]
    alpha: Float[Array, "1"]

    SPECS: ClassVar = {"phi": Spec((None, "stream_embed"), decay=True), "bias": Spec((None,)), "alpha": Spec((None,))}

    def __init__(self, config: ModelConfig):
        n = config.connections.streams
        self.phi = jnp.zeros((n, n * config.dim))
        self.bias = pre_bias(n, jnp.asarray(2 * config.num_layers))
        self.alpha = jnp.full(1, config.connections.gate_init, jnp.float32)
        self.norm_eps: float = config.norm_eps

    def __call__(self, x: Float[Array, "B S nC"]) -> Float[Array, "n T"]:
        alpha = jnp.broadcast_to(self.alpha, self.bias.shape)
        return jax.nn.sigmoid(projected(x, self.phi, alpha, self.bias, self.norm_eps))


class Decoder(Module):
    """All parameters of the network, float32."""

    embedding: Float[Array, "V C"]
    dense_layers: Layer | None  # stacked
    moe_layers: Layer | None  # stacked
    head: Head | None
    final_norm: Float[Array, "C"]
    unembed: Float[Array, "C V"]

    SPECS: ClassVar = {
        "embedding": Spec(("vocab", "embed"), decay=True),
        "final_norm": Spec((None,)),
        "unembed": Spec(("embed", "vocab"), decay=True),
    }
    STACKS: ClassVar = ("dense_layers", "moe_layers")

    def __init__(self, config: ModelConfig, key: PRNGKeyArray):
        """Parameters that all residual kinds share have the same initial values for the same key."""
        k_embedding, k_layers, k_unembed = jax.random.split(key, 3)

        def stack(start: int, stop: int, dense: bool) -> Layer | None:
            if start == stop:
                return None
            index = jnp.arange(start, stop)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(k_layers, index)
            return jax.vmap(lambda i, k: Layer(config, i, k, dense))(index, keys)

        self.embedding = normal(k_embedding, (config.vocab_size, config.dim), config.init_std)
        self.dense_layers = stack(0, config.dense_layers, True)
        self.moe_layers = stack(config.dense_layers, config.num_layers, False)
        many = config.residual != "residual"
        self.head = Head(config) if many and config.connections.collapse == "learned" else None
        self.final_norm = jnp.ones(config.dim)
        self.unembed = normal(k_unembed, (config.dim, config.vocab_size), config.init_std)
        self.config: ModelConfig = config

    @property
    def streams(self) -> int:
        """n; 1 for the plain residual."""
        return 1 if self.config.residual == "residual" else self.config.connections.streams


def learnable_mappings(config: ModelConfig) -> Float[np.ndarray, "sublayers 3"]:
    """0 where the pre, post or res mapping of a sublayer cannot learn because all streams are still equal there, 1 elsewhere."""
    table = np.ones((2 * config.num_layers, 3), np.float32)
    learns = CONNECTIONS[config.residual].LEARNS_FROM_EQUAL_STREAMS
    table[0, : len(learns)] = learns
    return table


def initial_router_bias(config: ModelConfig) -> Float[Array, "L_moe E"]:
    """Selection biases of the MoE layers: state of the training, not parameters."""
    return jnp.zeros((config.num_layers - config.dense_layers, config.moe.num_experts))


def hidden_states(
    model: Decoder,
    tokens: Int[Array, "B S"],
    positions: Int[Array, "B S"],
    segment_ids: Int[Array, "B S"],
    router_bias: Float[Array, "L_moe E"],
    *,
    rules: Rules = Rules(),
    trace: bool = False,
) -> tuple[Float[Array, "B S C"], Aux]:
    """Final normalised hidden states in the compute dtype, and what the layers report.

    With `trace`, the connections' mappings for the first sequence are kept (memory: 2 L n^2 S float32).
    """
    config, n = model.config, model.streams
    wide_type = wide_dtype(model.embedding)
    compute = jnp.dtype(config.dtype) if wide_type == jnp.float32 else wide_type
    x = expand(model.embedding.astype(compute)[tokens], n)
    x = _constrain(x, rules)

    def layer_step(x, layer_and_bias):
        layer, bias = layer_and_bias

        def attention(u):
            return layer.attention(rms_norm(u, layer.attention_norm, config.norm_eps), positions, segment_ids)

        def ffn(u):
            u = rms_norm(u, layer.ffn_norm, config.norm_eps)
            if isinstance(layer.ffn, MoE):
                y, load, balance = layer.ffn(u, bias, rules)
                return y, (load, balance)
            return layer.ffn(u), (jnp.zeros(config.moe.num_experts, jnp.int32), jnp.zeros((), wide_type))

        x, largest, trace_attention = _sublayer(x, layer.attention_connection, attention, n, trace)
        x, (load, balance), trace_ffn = _sublayer(x, layer.ffn_connection, ffn, n, trace)
        x = _constrain(x, rules)
        return x, LayerAux(largest, load, balance, (trace_attention, trace_ffn) if trace else None)

    step = remat(layer_step, config.remat)
    reports = []
    if model.dense_layers is not None:
        no_bias = jnp.zeros((config.dense_layers, config.moe.num_experts))
        x, report = jax.lax.scan(step, x, (model.dense_layers, no_bias))
        reports.append(report)
    if model.moe_layers is not None:
        x, report = jax.lax.scan(step, x, (model.moe_layers, router_bias))
        reports.append(report)
    layers = jax.tree.map(lambda *parts: jnp.concatenate(parts), *reports)

    rms, cosine = _stream_statistics(x, n)
    aux = Aux(
        max_attention_logit=layers.max_attention_logit,
        expert_load=layers.expert_load[config.dense_layers :],
        balance_loss=layers.balance_loss.sum(),
        # [L, ...] for attention and for feed-forward -> [2 L, ...] in the order of the sublayers
        trace=jax.tree.map(lambda a, f: jnp.stack([a, f], axis=1).reshape(-1, *a.shape[1:]), *layers.trace) if trace else None,
        final_stream_rms=rms,
        final_stream_cosine=cosine,
    )
    if n > 1:
        tokens_count = x.shape[0] * x.shape[1]
        if model.head is not None:
            weights = model.head(x)
        else:
            weights = jnp.full((n, tokens_count), 1.0 / n if config.connections.collapse == "mean" else 1.0)
        x = collapse(x, weights)
    return rms_norm(x, model.final_norm, config.norm_eps), aux


def logits(model: Decoder, tokens, positions, segment_ids, router_bias, **kwargs) -> Float[Array, "B S V"]:
    """Logits of every position at once: for small inputs. Training uses `batch_loss`."""
    hidden, _ = hidden_states(model, tokens, positions, segment_ids, router_bias, **kwargs)
    return wide(hidden @ model.unembed.astype(hidden.dtype))


def batch_loss(
    model: Decoder, batch: dict[str, Array], router_bias: Float[Array, "L_moe E"], *, rules: Rules = Rules(), trace: bool = False
) -> tuple[Float[Array, ""], Int[Array, ""], Aux]:
    """Summed cross-entropy (nats) of a batch, the number of its targets, and what the layers report."""
    hidden, aux = hidden_states(model, batch["tokens"], batch["positions"], batch["segment_ids"], router_bias, rules=rules, trace=trace)
    total, count = next_token_loss(hidden, model.unembed, batch["targets"], model.config.loss_chunk)
    return total, count, aux


def _sublayer(x, connection: Connection, f, n: int, trace: bool):
    """One sublayer `f` inside its connection: new streams, what f reports, and the trace if asked for."""
    coefficients = connection.coefficients(x)
    y, report = f(read(x, coefficients))
    return write(x, y, coefficients), report, _trace(x, coefficients, n) if trace else None


def _trace(x: Float[Array, "B S nC"], c: Coefficients, n: int) -> SublayerTrace:
    length = x.shape[1]
    ones = jnp.ones((n, length))
    identity = jnp.broadcast_to(jnp.eye(n)[..., None], (n, n, length))
    rms, cosine = _stream_statistics(x, n)
    return SublayerTrace(
        pre=ones if c.pre is None else c.pre[:, :length],
        post=ones if c.post is None else c.post[:, :length],
        res=identity if c.res is None else c.res[..., :length],
        logit_std=jnp.full((), jnp.nan) if c.logits is None else c.logits[..., :length].std(),
        stream_rms=rms,
        stream_cosine=cosine,
    )


def _stream_statistics(x: Float[Array, "B S nC"], n: int) -> tuple[Float[Array, "n"], Float[Array, ""]]:
    """Root mean square of each stream and the mean cosine between different streams, over the first sequence."""
    streams = jnp.stack(split(wide(x[0]), n))
    rms = jnp.sqrt(jnp.mean(jnp.square(streams), axis=(1, 2)))
    if n == 1:
        return rms, jnp.ones((), rms.dtype)
    unit = streams * inverse_rms(streams, 1e-20) * streams.shape[-1] ** -0.5
    between = jnp.einsum("isc,jsc->sij", unit, unit)
    pairs = n * (n - 1)
    return rms, ((between.sum(axis=(1, 2)) - jnp.trace(between, axis1=1, axis2=2)) / pairs).mean()


def _constrain(x: Array, rules: Rules) -> Array:
    """Keeps activations split over the batch axis when a mesh is set."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, rules.spec("batch", None, None))
