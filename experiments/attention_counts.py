"""FLOPs and bytes of dense and of sparse latent attention as functions of position, counted from a config. Arithmetic, no arrays.

Counted is what depends on the position, and the indexer's own projections; everything else (the projections of latent attention, the
feed-forwards) is the same for both kinds. A multiplication with its addition is two FLOPs, whatever the data type. A token at position t
sees t + 1 keys, itself included.
"""

from collections.abc import Callable
from dataclasses import dataclass

from mhc_jax.config import Config
from mhc_jax.errors import UserError

BYTES = 2  # of a number: bfloat16 keys and latents
QUERIES = 512  # whose keys a dense or an indexer kernel reads once, in prefill
PAGE = 64  # queries that share the keys they read, with granularity "page"


@dataclass(frozen=True)
class Part:
    """One piece of a layer's attention: its cost for one token of one sequence, and how that grows."""

    flops_per_key: int
    bytes_per_key: int
    shared: int = 1  # queries that read a key together
    most_keys: int | None = None  # that a query attends to; None: all that it sees
    flops_fixed: int = 0  # at any position

    def keys(self, position: float) -> float:
        """Keys that the token at this position attends to or scores."""
        seen = position + 1
        return seen if self.most_keys is None else min(seen, self.most_keys)

    def flops(self, position: float) -> float:
        """Of the token at this position."""
        return self.flops_fixed + self.flops_per_key * self.keys(position)

    def bytes(self, position: float) -> float:
        """Key bytes that HBM moves for the token at this position, nothing of them staying on the chip for other queries."""
        return self.bytes_per_key * self.keys(position) / self.shared

    def prefill_flops(self, length: int) -> int:
        """Of all tokens of a sequence of this length, each seeing those up to itself."""
        return self.flops_fixed * length + self.flops_per_key * self.prefill_keys(length)

    def prefill_keys(self, length: int) -> int:
        """Pairs of a query and a key of such a sequence."""
        full = length if self.most_keys is None else min(length, self.most_keys)
        return full * (full + 1) // 2 + (length - full) * full


@dataclass(frozen=True)
class Counts:
    """The parts of a layer with dense attention and with sparse attention, in prefill or in decoding."""

    dense: Part
    sparse: Part  # attention to the chosen keys, token by token
    page: Part  # the same where a block of queries shares whole pages
    indexer: Part

    def dense_flops(self, position: float) -> float:
        return self.dense.flops(position)

    def sparse_flops(self, position: float) -> float:
        """Indexer and attention to what it chose."""
        return self.sparse.flops(position) + self.indexer.flops(position)

    def least_flops(self, position: float) -> float:
        """The same, attending in whichever form does fewer FLOPs: to the chosen latents, or to every key with those not chosen masked."""
        return min(self.sparse.flops(position), self.dense.flops(position)) + self.indexer.flops(position)

    def break_even(self) -> float:
        """The position from which on the sparse layer does fewer FLOPs than the dense one."""
        return crossing(self.sparse_flops, self.dense_flops)

    def masked_until(self) -> float:
        """The position up to which dense attention, the keys not chosen masked, does fewer FLOPs than attention to the chosen latents."""
        return crossing(self.sparse.flops, self.dense.flops)

    def indexer_leads(self) -> float:
        """The position from which on the indexer's scores take more FLOPs than the attention to the keys it chose."""
        return crossing(self.sparse.flops, lambda position: self.indexer.flops_per_key * self.indexer.keys(position))


def prefill_counts(config: Config) -> Counts:
    """Whole sequences: dense attention in its multi-head form, sparse attention in the latent space.

    Dense, a head and key: D + R multiplications for a logit, V for the output. Sparse: K + R and K.

    Raises:
      UserError: the config has no sparse attention.
    """
    a = config.model.attention
    sparse, page, indexer = _sparse_parts(config)
    dense = Part(
        flops_per_key=2 * a.num_heads * (a.nope_dim + a.rope_dim + a.value_dim),
        bytes_per_key=BYTES * (a.num_heads * (a.nope_dim + a.value_dim) + a.rope_dim),
        shared=QUERIES,
    )
    return Counts(dense, sparse, page, indexer)


def decode_counts(config: Config) -> Counts:
    """One token further over a cache: both kinds in the latent space (the absorbed form), no query sharing what another reads.

    Raises:
      UserError: the config has no sparse attention.
    """
    sparse, _, indexer = _sparse_parts(config)
    dense = Part(sparse.flops_per_key, sparse.bytes_per_key)
    alone = Part(indexer.flops_per_key, indexer.bytes_per_key, flops_fixed=indexer.flops_fixed)
    return Counts(dense, sparse, sparse, alone)


def _sparse_parts(config: Config) -> tuple[Part, Part, Part]:
    """Attention to chosen tokens, to chosen pages, and the indexer."""
    a, own = config.model.attention, config.model.attention.sparse
    if own is None or a.q_rank is None:
        raise UserError(f"the config {config.name!r} has no model.attention.sparse, whose cost is asked for; take deepseek_v32")
    per_key = 2 * a.num_heads * (2 * a.kv_rank + a.rope_dim)
    row = BYTES * (a.kv_rank + a.rope_dim)
    indexer = Part(
        flops_per_key=2 * own.index_heads * own.index_dim,
        bytes_per_key=BYTES * own.index_dim,
        shared=QUERIES,
        flops_fixed=2 * (a.q_rank * own.index_heads * own.index_dim + config.model.dim * (own.index_dim + own.index_heads)),
    )
    return Part(per_key, row, most_keys=own.top_k), Part(per_key, row, shared=PAGE, most_keys=own.top_k), indexer


def crossing(a: Callable[[float], float], b: Callable[[float], float], first: float = 0.0, last: float = 2.0**24) -> float:
    """The lowest position at which b(position) is no longer below a(position), for differences that change their sign once.

    Raises:
      ValueError: it does not change its sign between the two.
    """
    if b(first) >= a(first) or b(last) < a(last):
        raise ValueError(f"there is no crossing between {first:g} and {last:g}")
    while last - first > 1e-3:
        middle = (first + last) / 2
        if b(middle) >= a(middle):
            last = middle
        else:
            first = middle
    return last
