"""The whole decoder on a few more tokens of each sequence, with what it remembers of the tokens before in a cache.

The same layers, seams and heads as `decoder.hidden_states`, to rounding, one document a sequence. How tokens are chosen, and when a
sequence ends, is decided elsewhere (`mhc_jax.generate`).
"""

from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mhc_jax.config import ModelConfig
from mhc_jax.nn.decoder import Decoder, Layer, collapsed, embedded, feed_forward, sublayer, unembedded
from mhc_jax.nn.engram import ConvState, Engram
from mhc_jax.nn.mla import MLA, LatentCache
from mhc_jax.nn.ngram_hash import HashNumbers, next_rows
from mhc_jax.nn.norm import rms_norm
from mhc_jax.nn.residual.streams import unwritten
from mhc_jax.parallel.rules import Rules

# On a mesh sequences are split, and heads, hidden widths, experts and vocabulary as in training; positions never, since there is but one.
DECODING = Rules(sequence=None, positions=None, tokens=Rules.batch, all_heads=Rules.heads)


class Ngrams(NamedTuple):
    """Engram's tables, and what turns tokens into numbers of their rows (data/ngrams/artifact)."""

    tables: tuple[Float[Array, "rows head_dim"], ...]  # of each layer with a memory
    numbers: HashNumbers
    classes: Int[Array, "tokens"]  # class of each token id
    pad: Int[Array, ""]  # class that stands before the first token


class Network(NamedTuple):
    """A decoder with its layers one by one: a layer's slice of stacked parameters would be copied anew for every token."""

    model: Decoder  # without its layers
    layers: tuple[Layer, ...]
    engrams: tuple[Engram, ...]  # of the layers with a memory
    router_bias: tuple[Float[Array, "E"], ...]  # of every layer; zeros where it is dense
    ngrams: Ngrams | None


class Cache(NamedTuple):
    """What decoding remembers of each sequence; a layer's arrays stand by themselves, so that each is updated in place.

    Sequences come first in all of them: on a mesh they are split as `DECODING.spec("batch")` says.
    """

    length: Int[Array, "B"]  # tokens so far: the position of the next one
    latents: tuple[LatentCache, ...]
    convs: tuple[ConvState, ...]  # of the layers with a memory
    before: Int[Array, "B before"] | None  # classes of the last tokens, the newest last, -1 where there are none; None without Engram

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, capacity: int, dtype: jax.typing.DTypeLike | None = None) -> "Cache":
        """Room for `capacity` tokens of each of `batch` sequences, in the config's type unless another is given."""
        dtype = jnp.dtype(config.dtype if dtype is None else dtype)
        latents = tuple(LatentCache.empty(config.attention, batch, capacity, dtype) for _ in range(config.num_layers))
        length = jnp.zeros(batch, jnp.int32)
        if config.engram is None:
            return cls(length, latents, (), None)
        streams = 1 if config.residual == "residual" else config.connections.streams
        convs = tuple(ConvState.empty(batch, streams, config.dim) for _ in config.engram.layers)
        return cls(length, latents, convs, jnp.full((batch, config.engram.orders[-1] - 1), -1, jnp.int32))

    @property
    def capacity(self) -> int:
        """Tokens of a sequence that there is room for."""
        return self.latents[0].latent.shape[1]

    def check(self, config: ModelConfig) -> None:
        """Raises ValueError unless the cache has the shapes that this config needs."""
        wanted = jax.eval_shape(lambda: Cache.empty(config, len(self.length), self.capacity))
        ours, theirs = _shapes(self), _shapes(wanted)
        differ = [name for name in {**theirs, **ours} if ours.get(name) != theirs.get(name)]
        if differ:
            told = "; ".join(f"{name} is {ours.get(name, 'not there')}, needed is {theirs.get(name, 'none')}" for name in differ[:3])
            raise ValueError(f"the cache is that of another config: {told}")


def network_of(model: Decoder, router_bias: Float[Array, "L_moe E"], ngrams: Ngrams | None = None) -> Network:
    """Takes a decoder apart."""
    config = model.config

    def each(stack: Layer | Engram | None) -> tuple[Any, ...]:
        count = 0 if stack is None else len(jax.tree.leaves(stack)[0])
        return tuple(jax.tree.map(itemgetter(i), stack) for i in range(count))

    layers, engrams = (*each(model.dense_layers), *each(model.moe_layers)), each(model.engram)
    bare = jax.tree.map(lambda a: a, model)
    bare.dense_layers = bare.moe_layers = bare.engram = None
    no_bias = (jnp.zeros(config.moe.num_experts),) * config.dense_layers
    return Network(bare, layers, engrams, (*no_bias, *router_bias), ngrams)


def decode(
    network: Network, tokens: Int[Array, "B S"], count: Int[Array, "B"], cache: Cache, rules: Rules = DECODING
) -> tuple[Float[Array, "B V"], Cache]:
    """Logits after the last of some more tokens of each sequence, and the cache with these tokens.

    Args:
      network: see `network_of`.
      tokens: of each sequence the next ones; those from `count` on only fill up the row.
      count: how many are meant, 0 to S; the logits of a sequence with 0 mean nothing, and its cache stays as it is. A sequence may not
        outgrow the cache: tokens beyond its capacity are not remembered.
      cache: of the tokens before.
      rules: where parameters, sequences and caches lie under the mesh that is set, if any; of positions they split none.

    Raises:
      ValueError: the cache is that of another config.
    """
    model, config = network.model, network.model.config
    cache.check(config)
    count = count.astype(jnp.int32)
    steps = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    positions = jnp.where(steps < count[:, None], cache.length[:, None] + steps, cache.capacity)

    def attend(u: Array, attention: MLA, norm: Array, kept: LatentCache) -> tuple[Array, LatentCache]:
        return attention.decode(rms_norm(u, norm, config.norm_eps), positions, kept, rules)

    pending = unwritten(embedded(model, tokens, rules), network.layers[0].attention_connection.mapping)
    memory_layers = () if config.engram is None else config.engram.layer_ids
    rows, before = _rows(network, tokens, count, cache)
    latents, convs = [], []
    for index, (layer, kept, bias) in enumerate(zip(network.layers, cache.latents, network.router_bias)):
        connection = layer.attention_connection
        if index in memory_layers:
            own = memory_layers.index(index)
            x = connection.written(pending, rules)
            x, conv = network.engrams[own].decode(x, _read(network, rows, own, x.dtype), cache.convs[own], count, rules)
            pending = unwritten(x, connection.mapping)
            convs.append(conv)
        pending, kept = sublayer(pending, connection, attend, (layer.attention, layer.attention_norm, kept), rules)
        fed = (layer.ffn, layer.ffn_norm, bias, config, rules)
        pending, _ = sublayer(pending, layer.ffn_connection, feed_forward, fed, rules)
        latents.append(kept)
    x = connection.written(pending, rules)
    last = jnp.take_along_axis(x, jnp.maximum(count - 1, 0)[:, None, None], axis=1)
    logits = unembedded(model, collapsed(model, last, rules))[:, 0]
    return logits, Cache(cache.length + count, tuple(latents), tuple(convs), before)


def _rows(network: Network, tokens: Array, count: Array, cache: Cache) -> tuple[Int[Array, "B S layers heads"] | None, Array | None]:
    """The rows of the tables that the tokens read, and the classes that the next ones need."""
    ngrams, engram = network.ngrams, network.model.config.engram
    if engram is None:
        return None, None
    assert ngrams is not None and cache.before is not None
    before = jnp.where(cache.before < 0, ngrams.pad, cache.before)
    return next_rows(ngrams.classes[tokens], before, count, ngrams.numbers, engram.orders)


def _read(network: Network, rows: Array | None, layer: int, dtype: jnp.dtype) -> Float[Array, "B S M"]:
    """What the tokens read from the table of one layer."""
    assert network.ngrams is not None and rows is not None
    return network.ngrams.tables[layer][rows[:, :, layer]].reshape(*rows.shape[:2], -1).astype(dtype)


def _shapes(cache: Cache) -> dict[str, list[int]]:
    return {jax.tree_util.keystr(path): list(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(cache)}
