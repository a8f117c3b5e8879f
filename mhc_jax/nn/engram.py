"""Engram: what a layer reads from its table by n-grams, projected, gated and added to all streams (arXiv 2601.07372, sections 2.2 to 2.4).

The rows themselves are no parameters here: they come as values that were read already (`mhc_jax.tables`), so that the gradient of a table
is never an array of its size. Which rows a token reads is the business of `data/ngrams`, or of `ngram_hash` in decoding.
"""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from mhc_jax.config import ModelConfig
from mhc_jax.nn.linear import project
from mhc_jax.nn.module import Module, Spec, normal
from mhc_jax.nn.ngram_hash import newest
from mhc_jax.nn.norm import rms_norm, wide
from mhc_jax.nn.residual.streams import flat
from mhc_jax.parallel.rules import Rules
from mhc_jax.parallel.shards import STREAMS, TOKENS_LAST, on_shards, shard_count, with_halo
from pallas_kernels.engram_gate import DILATION, HALO, TAPS, ShortConv, gate_add, gate_conv_add

CONV_EPS = 1e-5  # of the norm before the convolution, as in the published code


class Engram(Module):
    """The memory of one layer, tables apart.

    One product makes a key for each stream and one value for all. A stream's gate is the sigmoid of the signed square root of the
    normalised product of stream and key; DeepSeek's code has the root, the paper's Eq. 4 has not. The value times the gate is
    added, with what a causal convolution over such values adds in the paper (none in V4.1). The convolution starts at zero.
    """

    keys_value: Float[Array, "M (n+1)*C"]  # keys of stream 0 to n-1, then the value; M = d_mem
    query_gain: Float[Array, "n C"]
    key_gain: Float[Array, "n C"]
    conv: Float[Array, "4 n C"] | None  # tap j is for the token 3 j back
    conv_gain: Float[Array, "n C"] | None

    SPECS: ClassVar = {
        "keys_value": Spec((None, "stream_embed"), decay=True),
        "query_gain": Spec((None, "embed")),
        "key_gain": Spec((None, "embed")),
        "conv": Spec((None, None, "embed")),
        "conv_gain": Spec((None, "embed")),
    }

    def __init__(self, config: ModelConfig, key: PRNGKeyArray):
        assert config.engram is not None
        n = 1 if config.residual == "residual" else config.connections.streams
        self.keys_value = normal(key, (config.engram.width, (n + 1) * config.dim), config.init_std)
        self.query_gain, self.key_gain = jnp.ones((n, config.dim)), jnp.ones((n, config.dim))
        self.conv = jnp.zeros((TAPS, n, config.dim)) if config.engram.conv else None
        self.conv_gain = jnp.ones((n, config.dim)) if config.engram.conv else None
        self.norm_eps: float = config.norm_eps

    def __call__(
        self, x: Float[Array, "B S nC"], memory: Float[Array, "B S M"], reach: Int[Array, "B S"], rules: Rules = Rules()
    ) -> tuple[Float[Array, "B S nC"], Float[Array, "n T"]]:
        """The streams with the memory added, and the gates of all tokens, float32.

        Args:
          x: the streams.
          memory: what every token read, heads of the first order first.
          reach: how many earlier tokens each token's convolution may see, see `reach_of`.
          rules: where tokens lie.
        """
        keys_value = project(memory.astype(x.dtype), self.keys_value)
        if self.conv is None:
            return self._added(x, keys_value, rules)
        halo = HALO if shard_count(rules, "sequence") > 1 else 0

        def add_conv(x: Array, keys_value: Array, gain: Array, reach: Array, weight: Array, conv_gain: Array) -> tuple[Array, Array]:
            if halo:  # the convolution sees the last tokens of the device before; what is computed for them is thrown away
                x, keys_value = (with_halo(a, halo, rules) for a in (x, keys_value))
                own = jnp.broadcast_to(jnp.arange(halo, dtype=reach.dtype), (len(reach), halo))
                reach = jnp.concatenate([own, reach], axis=1)
            conv = ShortConv(weight, conv_gain, reach.reshape(-1))
            out, gates = gate_conv_add(flat(x), flat(keys_value), gain, conv, norm_eps=self.norm_eps, conv_eps=CONV_EPS)
            gates = gates.reshape(len(gates), *reach.shape)[:, :, halo:]
            return out.reshape(x.shape)[:, halo:], gates.reshape(len(gates), -1)

        given = (STREAMS, STREAMS, None, ("batch", "sequence"), None, None)
        sharded = on_shards(add_conv, rules, given=given, results=(STREAMS, TOKENS_LAST))
        return sharded(x, keys_value, self.query_gain * self.key_gain, reach, self.conv, self.conv_gain)

    def decode(
        self,
        x: Float[Array, "B S nC"],
        memory: Float[Array, "B S M"],
        state: "ConvState",
        count: Int[Array, "B"],
        rules: Rules = Rules(),
    ) -> tuple[Float[Array, "B S nC"], "ConvState"]:
        """The next S tokens of one document a sequence, after those that `state` remembers; the first `count` are remembered then."""
        keys_value = project(memory.astype(x.dtype), self.keys_value)
        out, gates = self._added(x, keys_value, rules)
        if self.conv is None:
            return out, state
        batch, length, _ = x.shape
        n, width = self.query_gain.shape
        value = wide(keys_value[..., n * width :]).reshape(batch, length, 1, width)
        gated = gates.T.reshape(batch, length, n, 1) * value
        assert self.conv_gain is not None
        normed = rms_norm(gated, None, CONV_EPS) * self.conv_gain[None, None]
        past = jnp.concatenate([state.normed, normed], axis=1)  # token t of this call stands at HALO + t
        taps = [self.conv[j][None, None] * past[:, HALO - j * DILATION :][:, :length] for j in range(TAPS)]
        added = jax.nn.silu(sum(taps[1:], taps[0])).reshape(x.shape)
        return (wide(out) + added).astype(x.dtype), ConvState(newest(past, count, HALO))

    def _added(self, x: Array, keys_value: Array, rules: Rules) -> tuple[Array, Array]:
        """The streams with the gated value added, and the gates."""

        def add(x: Array, keys_value: Array, gain: Array) -> tuple[Array, Array]:
            out, gates = gate_add(flat(x), flat(keys_value), gain, norm_eps=self.norm_eps)
            return out.reshape(x.shape), gates

        sharded = on_shards(add, rules, given=(STREAMS, STREAMS, None), results=(STREAMS, TOKENS_LAST))
        return sharded(x, keys_value, self.query_gain * self.key_gain)


class ConvState(NamedTuple):
    """What the convolution remembers in decoding: normalised gated values of the tokens before, zero where there were none."""

    normed: Float[Array, "B 9 n C"]  # float32 or wider, the newest last

    @classmethod
    def empty(cls, batch: int, streams: int, width: int) -> "ConvState":
        """Before the first token of every sequence."""
        return cls(jnp.zeros((batch, HALO, streams, width)))


def reach_of(segment_ids: Int[Array, "B S"], cross_documents: bool) -> Int[Array, "B S"]:
    """How many tokens of the same document stand before each token in its row; with `cross_documents`, of any document."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32), segment_ids.shape)
    if cross_documents:
        return index
    begins = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
