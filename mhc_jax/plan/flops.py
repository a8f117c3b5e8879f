"""FLOPs of one token, part by part, from a config: the one formula of this library. And the bytes of a token's cache.

Notation: C width, H heads, D + R dimensions of a query (unrotated and rotated), V of a value, K and Q ranks of the latents, n streams, L
layers. A multiplication with its addition is two FLOPs, whatever the data type. For one token and one layer, forward:

    attention projections   2 [C Q + Q H (D + R)] + 2 C (K + R) + 2 K H (D + V) + 2 H V C; full-rank queries: 2 C H (D + R) for the first
    attention scores        2 H (D + R + V) a key; in the latent space, 2 H (2 K + R)         (`plan.attention`)
    indexer projections     2 [Q J I + C (I + J)]     J heads of I
    indexer scores          2 J I a key
    router                  2 C E                     E experts
    experts                 6 C F (top_k + shared)    F wide
    dense feed-forward      6 C F'
    stream mappings         2 sites: mHC 2 n C n(n+2) and 4 n^2 a Sinkhorn step; identity HC 2 n C 2n; HC 2 n C (n+2); static HC 0;
                            other kinds as `residual_kinds` says
    stream mixing           2 sites: read 2 n C, write 2 n C, and n^2 (2 C) for H_res
    Engram                  2 M C (n+1) and, element by element, 4 n C (gate) and 8 n C (convolution); M numbers read
    unembedding             2 C vocabulary, once

Keys are those that causality shows: (S + 1) / 2 a token on average over a sequence of S, not S. Multiplying queries and outputs with the
matrix that expands latents, as sparse attention and decoding do, takes as many FLOPs as expanding keys and values. Sequences up to `top_k`
run dense.

Training is forward plus backward, 3 times forward, but for the indexer, whose inputs are detached (its projections: 2 times) and whose
gradient covers the chosen keys alone, and for its warm-up, in which all else is frozen and runs forward. Not counted: norms, rotary
embedding, softmax, activations, the optimizer; and, as usual in model FLOPs, whatever is computed a second time.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mhc_jax import residual_kinds
from mhc_jax.config import Config, ModelConfig
from mhc_jax.plan.attention import Part, absorbed, expanded, indexer

Kind = Literal["matrices", "wide", "attention", "index", "streams"]

# Of every part, what decides the number format that it may run in: DeepSeek-V3 multiplies with "matrices" in 8 bits, and keeps what is
# "wide" here and attention in 16 (arXiv 2412.19437, section 3.3.1).
KINDS: dict[str, Kind] = {
    "attention projections": "matrices",
    "attention scores and values": "attention",
    "indexer projections": "matrices",
    "indexer scores": "index",
    "router": "wide",
    "experts": "matrices",
    "dense feed-forward": "matrices",
    "stream mappings": "streams",
    "stream mixing": "streams",
    "Engram": "matrices",
    "unembedding": "wide",
}
PARTS = tuple(KINDS)


@dataclass(frozen=True)
class Flops:
    """FLOPs of one token by part, in the order of PARTS; a part that a config has not is 0."""

    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    def of(self, kind: Kind) -> float:
        """Of the parts of one kind together."""
        return sum(flops for name, flops in self.parts.items() if KINDS[name] == kind)

    def weighted(self, weights: Mapping[Kind, float]) -> float:
        """The total with every kind weighted, as when an 8-bit FLOP counts 1 and a 16-bit one 2."""
        return sum(weight * self.of(kind) for kind, weight in weights.items())

    def share(self, part: str) -> float:
        return self.parts[part] / self.total


def table(columns: Mapping[str, Flops], unit: float = 1e9) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table, a part a row and the total last, in GFLOP unless another unit is given; parts that are 0 are left out."""
    rows = [
        [part, *(f"{flops.parts[part] / unit:,.2f}" for flops in columns.values())]
        for part in PARTS
        if any(flops.parts[part] for flops in columns.values())
    ]
    return ["part", *columns], [*rows, ["total", *(f"{flops.total / unit:,.2f}" for flops in columns.values())]]


def forward_flops(config: Config, length: int) -> Flops:
    """Forward, the mean over the tokens of a causal sequence of `length` tokens."""
    scores, index = _sequence_keys(config.model, length)
    return _forward(config.model, scores, index)


def training_flops(config: Config, length: int) -> Flops:
    """Forward and backward, the mean over the tokens of a causal sequence of `length` tokens; the stage is that of the config."""
    m = config.model
    scores, index = _sequence_keys(m, length)
    forward = _forward(m, scores, index)
    sparse = m.attention.sparse
    if sparse is None:
        return Flops({part: 3 * flops for part, flops in forward.parts.items()})
    warmup = sparse.stage == "warmup"
    learnt = length if warmup else min(length, sparse.top_k)
    pairs = Part(0, 0, most_keys=learnt).prefill_keys(length) / length
    own = {
        "indexer projections": 2 * forward.parts["indexer projections"],
        "indexer scores": forward.parts["indexer scores"] + 2 * m.num_layers * indexer(m.dim, m.attention).flops_per_key * pairs,
    }
    return Flops({part: own.get(part, (1 if warmup else 3) * flops) for part, flops in forward.parts.items()})


def prefill_flops(config: Config, position: int) -> Flops:
    """Forward, the token at this position of a prompt, which sees position + 1 keys.

    Sparse attention runs in whichever form does fewer FLOPs, as a service would: in the latent space over the chosen keys, or expanded over
    all of them with those not chosen masked.
    """
    m, a = config.model, config.model.attention
    if a.sparse is None or a.sparse.stage == "warmup":
        return _forward(m, expanded(a).flops(position), 0, indexed=False)
    scores = min(absorbed(a, a.sparse.top_k).flops(position), expanded(a).flops(position))
    return _forward(m, scores, indexer(m.dim, a).flops_per_key * (position + 1))


def decode_flops(config: Config, position: int) -> Flops:
    """One token further at this position (it sees position + 1 keys), over a cache, so attention in the latent space; forward."""
    m, a = config.model, config.model.attention
    sparse = a.sparse is not None and a.sparse.stage == "sparse"
    attends = absorbed(a, a.sparse.top_k if a.sparse is not None and sparse else None)
    index = indexer(m.dim, a).flops_per_key * (position + 1) if sparse else 0
    return _forward(m, attends.flops(position), index, indexed=sparse)


def _sequence_keys(m: ModelConfig, length: int) -> tuple[float, float]:
    """FLOPs of attention's and of the indexer's keys, a token and layer."""
    a = m.attention
    if a.sparse is None:
        return expanded(a).prefill_flops(length) / length, 0
    pairs = Part(0, 0).prefill_keys(length) / length
    dense = a.sparse.stage == "warmup" or length <= a.sparse.top_k
    attends = expanded(a) if dense else absorbed(a, a.sparse.top_k)
    return attends.prefill_flops(length) / length, indexer(m.dim, a).flops_per_key * pairs


def _forward(m: ModelConfig, scores: float, index: float, indexed: bool = True) -> Flops:
    """`scores` and `index`: FLOPs of a layer's keys; `indexed`: whether an indexer that is there runs."""
    a, e, c, layers = m.attention, m.moe, m.dim, m.num_layers
    query = a.num_heads * (a.nope_dim + a.rope_dim)
    queries = c * query if a.q_rank is None else c * a.q_rank + a.q_rank * query
    latents = c * (a.kv_rank + a.rope_dim) + a.kv_rank * a.num_heads * (a.nope_dim + a.value_dim)
    projections = 2 * (queries + latents + a.num_heads * a.value_dim * c)
    sparse_layers = layers - m.dense_layers
    mappings, mixing = _streams(m)
    return Flops(
        {
            "attention projections": layers * projections,
            "attention scores and values": layers * scores,
            "indexer projections": layers * indexer(c, a).flops_fixed if a.sparse is not None and indexed else 0,
            "indexer scores": layers * index,
            "router": sparse_layers * 2 * c * e.num_experts,
            "experts": sparse_layers * 6 * c * e.expert_dim * (e.top_k + e.shared_experts),
            "dense feed-forward": m.dense_layers * 6 * c * m.dense_dim,
            "stream mappings": mappings,
            "stream mixing": mixing,
            "Engram": _engram(m),
            "unembedding": 2 * c * m.vocab_size,
        }
    )


def _streams(m: ModelConfig) -> tuple[float, float]:
    """FLOPs of all coefficients and of all mixing, the collapse at the end included."""
    if m.residual == "residual":
        return 0, 0
    n, c = m.connections.streams, m.dim
    kind = residual_kinds.KINDS[m.residual]
    mixed = n * n if kind.mixes else 0
    learned = m.connections.collapse == "learned"
    sites = 2 * m.num_layers
    own = 2 * n * c * kind.columns(n) + kind.res_flops(n, m.connections.sinkhorn_steps)
    mappings = sites * own + (2 * n * c * n if learned else 0)
    return mappings, sites * 2 * c * (2 * n + mixed) + (2 if learned else 1) * n * c


def _engram(m: ModelConfig) -> float:
    if m.engram is None:
        return 0
    n = 1 if m.residual == "residual" else m.connections.streams
    elements = 4 + (8 if m.engram.conv else 0)
    return len(m.engram.layers) * (2 * m.engram.width * m.dim * (n + 1) + elements * n * m.dim)


@dataclass(frozen=True)
class CacheRow:
    """Bytes of one cached token in one layer."""

    latent: float  # key and value of all heads
    index_key: float  # what the indexer scores; 0 without one

    @property
    def total(self) -> float:
        return self.latent + self.index_key


def cache_row(config: Config, form: Literal["bfloat16", "float8"] = "bfloat16") -> CacheRow:
    """A token's row in one layer's cache.

    Args:
      form: bfloat16 is what this library keeps. float8 is the published form of DeepSeek-V3.2: latent and index key in e4m3 with one
        float32 scale for each 128 numbers, the rotated key in bfloat16 (656 and 132 bytes).
    """
    a = config.model.attention
    index = 0 if a.sparse is None or a.sparse.stage == "warmup" else a.sparse.index_dim
    if form == "bfloat16":
        return CacheRow(2 * (a.kv_rank + a.rope_dim), 2 * index)
    return CacheRow(_scaled(a.kv_rank) + 2 * a.rope_dim, _scaled(index))


def cache_bytes(config: Config, length: int, form: Literal["bfloat16", "float8"] = "bfloat16") -> float:
    """The cache of one sequence of `length` tokens, in all layers, with what Engram keeps whatever the length."""
    m = config.model
    engram = 0
    if m.engram is not None:
        n = 1 if m.residual == "residual" else m.connections.streams
        engram = len(m.engram.layers) * 9 * n * m.dim * 4 + 4 * (m.engram.orders[-1] - 1)
    return m.num_layers * cache_row(config, form).total * length + engram


def _scaled(numbers: int) -> float:
    return numbers + 4 * numbers / 128
