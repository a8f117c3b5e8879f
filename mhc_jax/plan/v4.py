"""DeepSeek-V4 (arXiv 2606.19348) counted from its released config.json: parameters, FLOPs of a decoded token, bytes of its cache.

The decoder here has no compressed attention, so V4 is no config; this is a frozen description for comparisons. What a layer's queries see:

    all layers           the last 128 tokens, themselves included
    CSA (compress 4)     besides, `top_k` of the t/4 compressed entries, chosen by an indexer over all of these (64 heads of 128)
    HCA (compress 128)   besides, all t/128 compressed entries

One latent of 512 numbers is key and value of every head, so a key costs 2 H (512 + 512) FLOPs. The multi-token prediction layer is left
out. Bytes of the cache are those of the released kernels: an entry is 448 numbers in float8 with a scale for each 64, and 64 rotated ones
in bfloat16, 583 bytes; an index key is 128 numbers in float4 with a scale for each 32, 68 bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from mhc_jax.plan.flops import Flops, Kind

HEAD, INDEX_HEADS, INDEX = 512, 64, 128  # numbers of an entry; heads of the indexer, and numbers of each
CSA, HCA, WINDOW = 4, 128, 128  # tokens of a compressed entry; tokens seen as they are
ENTRY_BYTES = 448 + 448 // 64 + 2 * 64
INDEX_BYTES = INDEX // 2 + INDEX // 32
STREAMS, VOCABULARY = 4, 129_280

# What a FLOP counts when one in 8 bits counts 1, as the report does: attention in bfloat16, V4's index scores in float4, V3.2's in float8.
V4_WEIGHTS: Mapping[Kind, float] = {"matrices": 1, "wide": 2, "attention": 2, "index": 0.5, "streams": 2}
V32_WEIGHTS: Mapping[Kind, float] = {"matrices": 1, "wide": 2, "attention": 2, "index": 1, "streams": 2}


@dataclass(frozen=True)
class V4:
    """One of the two models."""

    name: str
    dim: int
    heads: int
    q_rank: int
    out_groups: int  # of 1024 numbers, through which the heads' outputs go
    experts: int  # routed; one more is shared, and six of them are visited
    expert_dim: int
    top_k: int  # compressed entries that a query of a CSA layer attends to
    window_layers: int  # with no compressed entries
    csa_layers: int
    hca_layers: int

    @property
    def layers(self) -> int:
        return self.window_layers + self.csa_layers + self.hca_layers

    def _matrices(self) -> dict[str, int]:
        """Numbers of the weight matrices that a token visits, by part."""
        out = 1024 * self.out_groups
        attention = self.dim * (self.q_rank + HEAD) + self.heads * HEAD * (self.q_rank + 1024) + out * self.dim
        compressors = 2 * self.dim * HEAD * (2 * self.csa_layers + self.hca_layers)  # an entry overlaps with the one before in CSA
        index = self.q_rank * INDEX_HEADS * INDEX + self.dim * (INDEX_HEADS + 4 * INDEX)
        return {
            "attention projections": self.layers * attention + compressors,
            "indexer projections": self.csa_layers * index,
            "router": self.layers * self.dim * self.experts,
            "experts": self.layers * self.expert * (6 + 1),
            "stream mappings": 2 * self.layers * STREAMS * self.dim * STREAMS * (STREAMS + 2),
            "unembedding": self.dim * VOCABULARY,
        }

    @property
    def expert(self) -> int:
        return 3 * self.dim * self.expert_dim

    @property
    def active_parameters(self) -> int:
        """Without the input embedding."""
        return sum(self._matrices().values())

    @property
    def parameters(self) -> int:
        return self.active_parameters + self.dim * VOCABULARY + self.layers * self.expert * (self.experts - 6)

    def decode_flops(self, length: int) -> Flops:
        """One token that sees `length` tokens, itself included."""
        entry = 2 * self.heads * 2 * HEAD
        own = min(length, WINDOW)
        seen = self.csa_layers * (own + min(self.top_k, length // CSA)) + self.hca_layers * (own + length // HCA) + self.window_layers * own
        return Flops(
            {
                **{part: 2 * numbers for part, numbers in self._matrices().items()},
                "attention scores and values": entry * seen,
                "indexer scores": self.csa_layers * 2 * INDEX_HEADS * INDEX * (length // CSA),
                "stream mixing": 2 * self.layers * 2 * self.dim * STREAMS * (STREAMS + 2),
            }
        )

    def cache_bytes(self, length: int) -> float:
        """The cache of one sequence of `length` tokens."""
        compressed = self.csa_layers * (ENTRY_BYTES + INDEX_BYTES) / CSA + self.hca_layers * ENTRY_BYTES / HCA
        return length * compressed + self.layers * min(length, WINDOW) * ENTRY_BYTES


# config.json of the releases of April 2026; layers by their `compress_ratios`.
FLASH = V4("V4-Flash", 4096, 64, 1024, 8, 256, 2048, 512, 2, 21, 20)
PRO = V4("V4-Pro", 7168, 128, 1536, 16, 384, 3072, 1024, 0, 30, 31)
