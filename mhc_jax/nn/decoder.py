"""The network: embedding, layers of two sublayers joined by residual connections, collapse, norm, head.

    embed -> n equal streams -> per sublayer: seam -> norm -> attention or feed-forward -> ... -> write -> collapse -> norm -> logits

Before the layers that have a memory, what they read from it is added to all streams (`mhc_jax.nn.engram`).

A seam writes the output of the sublayer before and reads the input of the next, so what runs from layer to layer is a `Pending`. Layers of
one kind are stacked along axis 0 and run under `jax.lax.scan`, in pieces between layers with a memory. A sublayer never knows how many
streams there are; a connection never knows what the sublayer is. The scopes' names say which part a compiled operation belongs to
(`mhc_jax.plan.parts`).
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from mhc_jax.config import ModelConfig
from mhc_jax.nn.embedding import embed
from mhc_jax.nn.engram import Engram, reach_of
from mhc_jax.nn.ffn import SwiGLU
from mhc_jax.nn.loss import next_token_loss
from mhc_jax.nn.mla import MLA
from mhc_jax.nn.module import Module, Spec, normal
from mhc_jax.nn.moe import MoE
from mhc_jax.nn.norm import inverse_rms, rms_norm, sublayer_input, wide, wide_dtype
from mhc_jax.nn.remat import kept, recomputed, scan_layers
from mhc_jax.nn.residual.kinds import CONNECTIONS
from mhc_jax.nn.residual.mhc import pre_bias, projected
from mhc_jax.nn.residual.socket import Connection
from mhc_jax.nn.residual.streams import Pending, collapse, expand, split, unpack, unwritten
from mhc_jax.parallel.rules import Rules
from mhc_jax.parallel.shards import STREAMS, constrained, first_sequence, on_shards


class SublayerTrace(NamedTuple):
    """What a connection did to the first sequence of the batch; n streams, S tokens."""

    pre: Float[Array, "n S"]
    post: Float[Array, "n S"]
    res: Float[Array, "n n S"]
    logit_std: Float[Array, ""]  # of what H_res is made of; NaN where there are no logits
    stream_rms: Float[Array, "n"]  # before the sublayer
    stream_cosine: Float[Array, ""]  # mean over pairs of different streams and tokens; 1 for one stream


class LayerAux(NamedTuple):
    """What a layer reports beside its output. Stacked over layers by the scan."""

    max_attention_logit: Float[Array, ""]
    indexer_loss: Float[Array, ""]  # nats, summed over tokens; 0 without an indexer
    expert_load: Int[Array, "E"]  # tokens per expert over the whole batch; zeros in a dense layer
    balance_loss: Float[Array, ""]
    trace: tuple[SublayerTrace, SublayerTrace] | None  # attention, feed-forward; None unless asked for


class Aux(NamedTuple):
    """What the network reports beside its output."""

    max_attention_logit: Float[Array, "L"]
    indexer_loss: Float[Array, "L"]  # nats, summed over tokens; zeros without an indexer
    expert_load: Int[Array, "L_moe E"]
    balance_loss: Float[Array, ""]  # summed over layers
    trace: SublayerTrace | None  # arrays stacked over 2 * L sublayers; None unless asked for
    final_stream_rms: Float[Array, "n"]
    final_stream_cosine: Float[Array, ""]
    gates: Float[Array, "memories n S"] | None  # of each layer with a memory, for the first sequence; None unless asked for


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
        return jax.nn.sigmoid(projected(x, self.phi, self.alpha[0], self.bias, self.norm_eps))


class Decoder(Module):
    """All parameters of the network, float32."""

    embedding: Float[Array, "V C"]
    dense_layers: Layer | None  # stacked
    moe_layers: Layer | None  # stacked
    engram: Engram | None  # stacked: of the layers that have a memory
    head: Head | None
    final_norm: Float[Array, "C"]
    unembed: Float[Array, "C V"]

    SPECS: ClassVar = {
        "embedding": Spec(("vocab", "embed"), decay=True),
        "final_norm": Spec((None,)),
        "unembed": Spec(("embed", "vocab"), decay=True),
    }
    STACKS: ClassVar = ("dense_layers", "moe_layers", "engram")

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
        self.engram = None
        if config.engram is not None:
            keys = jax.random.split(jax.random.fold_in(k_layers, config.num_layers), len(config.engram.layers))
            self.engram = jax.vmap(lambda k: Engram(config, k))(keys)
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
    """0 where the pre, post or res mapping of a sublayer cannot learn, 1 elsewhere.

    At the first sublayer because all streams are still equal there; at the last because what follows sees column sums alone.
    """
    table = np.ones((2 * config.num_layers, 3), np.float32)
    part = CONNECTIONS[config.residual]
    first = part.LEARNS_FROM_EQUAL_STREAMS if streams_start_equal(config) else ()
    last = part.LEARNS_BEFORE_A_SUM if config.connections.collapse != "learned" else ()
    for sublayer, learns in ((0, first), (-1, last)):
        table[sublayer, : len(learns)] = learns
    return table


def streams_start_equal(config: ModelConfig) -> bool:
    """Whether the first sublayer finds equal streams. It does not where the first layer has a memory, whose gates differ by stream."""
    return config.engram is None or config.engram.layer_ids[0] > 0


def initial_router_bias(config: ModelConfig) -> Float[Array, "L_moe E"]:
    """Selection biases of the MoE layers: state of the training, not parameters."""
    return jnp.zeros((config.num_layers - config.dense_layers, config.moe.num_experts))


def embedded(model: Decoder, tokens: Int[Array, "B S"], rules: Rules = Rules()) -> Float[Array, "B S nC"]:
    """The streams before the first layer, all equal, in the compute type."""
    wide_type = wide_dtype(model.embedding)
    compute = jnp.dtype(model.config.dtype) if wide_type == jnp.float32 else wide_type
    with jax.named_scope("embedding"):
        return expand(embed(model.embedding, tokens, compute, rules), model.streams)


def sublayer(
    pending: Pending, connection: Connection, f: Callable[..., Any], own: tuple[Any, ...], rules: Rules = Rules()
) -> tuple[Pending, Any]:
    """One sublayer behind its connection: `f(u, *own)` gives its output, which stays pending, and whatever else it tells."""
    with jax.named_scope("connections"):
        x, u, h = connection.seam(pending, rules)
    y, told = f(u, *own)
    return Pending(x, constrained(y, rules, *STREAMS), h), told


def feed_forward(
    u: Float[Array, "B S C"],
    ffn: SwiGLU | MoE,
    norm: Float[Array, "C"],
    bias: Float[Array, "E"],
    config: ModelConfig,
    rules: Rules = Rules(),
) -> tuple[Float[Array, "B S C"], tuple[Int[Array, "E"], Float[Array, ""]]]:
    """Either kind of feed-forward behind its norm: its output, the tokens of each expert and the balance loss."""
    u = sublayer_input(u, norm, config.norm_eps)
    if isinstance(ffn, MoE):
        y, load, balance = ffn(u, bias, rules)
        return y, (load, balance)
    y = ffn(constrained(u, rules, "batch", "positions", None), rules)
    return y, (jnp.zeros(config.moe.num_experts, jnp.int32), jnp.zeros((), wide_dtype(norm)))


def collapsed(model: Decoder, x: Float[Array, "B S nC"], rules: Rules = Rules()) -> Float[Array, "B S C"]:
    """The streams after the last layer as one, normalised: what the output head multiplies."""
    config, n = model.config, model.streams

    def read(head: Head | None, x: Float[Array, "B S nC"]) -> Float[Array, "B S C"]:
        equal = 1.0 / n if config.connections.collapse == "mean" else 1.0
        return collapse(x, jnp.full((n, x.shape[0] * x.shape[1]), equal) if head is None else head(x))

    if n > 1:
        with jax.named_scope("connections"):
            x = on_shards(read, rules, given=(None, STREAMS), results=STREAMS)(model.head, x)
    return rms_norm(x, model.final_norm, config.norm_eps)


def unembedded(model: Decoder, hidden: Float[Array, "B S C"]) -> Float[Array, "B S V"]:
    """Logits, float32 or wider."""
    return wide(hidden @ model.unembed.astype(hidden.dtype))


def hidden_states(
    model: Decoder,
    tokens: Int[Array, "B S"],
    positions: Int[Array, "B S"],
    segment_ids: Int[Array, "B S"],
    router_bias: Float[Array, "L_moe E"],
    *,
    memory: tuple[Float[Array, "B S d_mem"], ...] = (),
    rules: Rules = Rules(),
    trace: bool = False,
) -> tuple[Float[Array, "B S C"], Aux]:
    """Final normalised hidden states in the compute dtype, and what the layers report.

    `memory` is what the tokens read from the table of each layer that has one. With `trace`, the connections' mappings for the first
    sequence are kept (memory: 2 L n^2 S float32).

    Raises:
      ValueError: `memory` is not one array for each layer of `config.engram`.
    """
    config, n = model.config, model.streams
    memory_layers = () if config.engram is None else config.engram.layer_ids
    if len(memory) != len(memory_layers):
        raise ValueError(f"memory holds {len(memory)} arrays, but {len(memory_layers)} layers have a memory; give one for each")
    connection = next(stack for stack in (model.dense_layers, model.moe_layers) if stack is not None).attention_connection
    pending = unwritten(embedded(model, tokens, rules), connection.mapping)
    run = kept if config.remat == "streams" else lambda f: f

    def attention(u, attention, norm, positions, segment_ids):
        with jax.named_scope("attention"):
            return attention(sublayer_input(u, norm, config.norm_eps), positions, segment_ids, rules)

    def ffn(u, ffn, norm, bias):
        with jax.named_scope("experts" if isinstance(ffn, MoE) else "feed_forward"):
            return feed_forward(u, ffn, norm, bias, config, rules)

    def layer_step(pending, layer_and_bias):
        layer, bias = layer_and_bias
        of_attention = (layer.attention, layer.attention_norm, positions, segment_ids)
        attended, told = sublayer(pending, layer.attention_connection, run(attention), of_attention, rules)
        of_ffn = (layer.ffn, layer.ffn_norm, bias)
        fed, (load, balance) = sublayer(attended, layer.ffn_connection, run(ffn), of_ffn, rules)
        traces = None
        if trace:
            traces = _trace(attended, layer.attention_connection, rules), _trace(fed, layer.ffn_connection, rules)
        return fed, LayerAux(told.max_logit, told.indexer_loss, load, balance, traces)

    def with_memory(pending, index):
        """The streams with what layer `memory_layers[index]` reads from its table; the write before it cannot be part of a seam."""
        assert config.engram is not None
        reach = reach_of(segment_ids, config.engram.cross_documents)
        own = jax.tree.map(lambda a: a[index], model.engram)
        with jax.named_scope("connections"):
            x = connection.written(pending, rules)
        with jax.named_scope("engram"):
            x, gates = recomputed(lambda engram, x, read: engram(x, read, reach, rules), config.remat)(own, x, memory[index])
        return unwritten(x, connection.mapping), first_sequence(gates, len(x), rules)

    reports, gates = [], []
    no_bias = jnp.zeros((config.dense_layers, config.moe.num_experts))
    for first, stack in ((0, (model.dense_layers, no_bias)), (config.dense_layers, (model.moe_layers, router_bias))):
        if stack[0] is None:
            continue
        end = first + len(stack[1])
        stops = [first, *(layer for layer in memory_layers if first < layer < end), end]
        for start, stop in pairwise(stops):
            if start in memory_layers:
                pending, of_layer = with_memory(pending, memory_layers.index(start))
                gates.append(of_layer)
            part = stack if stop - start == end - first else jax.tree.map(lambda a: a[start - first : stop - first], stack)  # noqa: B023
            pending, report = scan_layers(layer_step, pending, part, config.remat, n)
            reports.append(report)
    layers = jax.tree.map(lambda *parts: jnp.concatenate(parts), *reports)

    with jax.named_scope("connections"):
        x = connection.written(pending, rules)
    rms, cosine = _stream_statistics(x, n)
    aux = Aux(
        max_attention_logit=layers.max_attention_logit,
        indexer_loss=layers.indexer_loss,
        expert_load=layers.expert_load[config.dense_layers :],
        balance_loss=layers.balance_loss.sum(),
        # [L, ...] for attention and for feed-forward -> [2 L, ...] in the order of the sublayers
        trace=jax.tree.map(lambda a, f: jnp.stack([a, f], axis=1).reshape(-1, *a.shape[1:]), *layers.trace) if trace else None,
        final_stream_rms=rms,
        final_stream_cosine=cosine,
        gates=jnp.stack(gates) if trace and gates else None,
    )
    return collapsed(model, x, rules), aux


def logits(model: Decoder, tokens, positions, segment_ids, router_bias, **kwargs) -> Float[Array, "B S V"]:
    """Logits of every position at once: for small inputs. Training uses `batch_loss`."""
    hidden, _ = hidden_states(model, tokens, positions, segment_ids, router_bias, **kwargs)
    return unembedded(model, hidden)


def batch_loss(
    model: Decoder,
    batch: dict[str, Array],
    router_bias: Float[Array, "L_moe E"],
    *,
    memory: tuple[Float[Array, "B S d_mem"], ...] = (),
    rules: Rules = Rules(),
    trace: bool = False,
) -> tuple[Float[Array, ""], Int[Array, ""], Aux]:
    """Summed cross-entropy (nats) of a batch, the number of its targets, and what the layers report."""
    where = (batch["tokens"], batch["positions"], batch["segment_ids"])
    hidden, aux = hidden_states(model, *where, router_bias, memory=memory, rules=rules, trace=trace)
    with jax.named_scope("loss"):
        total, count = next_token_loss(hidden, model.unembed, batch["targets"], model.config.loss_chunk, rules)
    return total, count, aux


def _trace(pending: Pending, connection: Connection, rules: Rules) -> SublayerTrace:
    x, _, h = pending
    length, mapping = x.shape[1], connection.mapping
    n = 1 if mapping is None else mapping.n
    ones, identity = jnp.ones((n, length)), jnp.broadcast_to(jnp.eye(n)[..., None], (n, n, length))
    rms, cosine = _stream_statistics(x, n)
    if mapping is None or h is None:
        return SublayerTrace(ones, ones, identity, jnp.full((), jnp.nan), rms, cosine)
    pre, post, res = unpack(first_sequence(h, len(x), rules), mapping)
    logits = connection.res_logits(x[:1])
    return SublayerTrace(
        pre=pre,
        post=post,
        res=identity if res is None else res,
        logit_std=jnp.full((), jnp.nan) if logits is None else logits.std(),
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
