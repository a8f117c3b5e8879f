"""FLOPs and bytes of dense and of sparse latent attention as functions of position, counted from a config. Arithmetic, no arrays.

Counted is what depends on the position, and the indexer's own projections; everything else (the projections of latent attention, the
feed-forwards) is the same for both kinds. A multiplication with its addition is two FLOPs, whatever the data type. A token at position t
sees t + 1 keys, itself included.
"""

from collections.abc import Callable
from dataclasses import dataclass

from mhc_jax.config import AttentionConfig, Config
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


def expanded(a: AttentionConfig) -> Part:
    """Dense attention in its multi-head form, as over whole sequences: a head and key take D + R multiplications for a logit and V for the
    output."""
    return Part(
        flops_per_key=2 * a.num_heads * (a.nope_dim + a.rope_dim + a.value_dim),
        bytes_per_key=BYTES * (a.num_heads * (a.nope_dim + a.value_dim) + a.rope_dim),
        shared=QUERIES,
    )


def absorbed(a: AttentionConfig, most_keys: int | None = None, shared: int = 1) -> Part:
    """Attention in the latent space, as over a cache and over chosen keys: a head and key take K + R multiplications and K."""
    return Part(2 * a.num_heads * (2 * a.kv_rank + a.rope_dim), BYTES * (a.kv_rank + a.rope_dim), shared, most_keys)


def indexer(dim: int, a: AttentionConfig, shared: int = 1) -> Part:
    """The indexer's scores, and at any position its projections from a model of width `dim`; `a` must have one."""
    own = a.sparse
    assert own is not None and a.q_rank is not None
    return Part(
        flops_per_key=2 * own.index_heads * own.index_dim,
        bytes_per_key=BYTES * own.index_dim,
        shared=shared,
        flops_fixed=2 * (a.q_rank * own.index_heads * own.index_dim + dim * (own.index_dim + own.index_heads)),
    )


def prefill_counts(config: Config) -> Counts:
    """Whole sequences: dense attention in its multi-head form, sparse attention in the latent space.

    Raises:
      UserError: the config has no sparse attention.
    """
    a, top_k = config.model.attention, _top_k(config)
    scores = indexer(config.model.dim, a, shared=QUERIES)
    return Counts(expanded(a), absorbed(a, top_k), absorbed(a, top_k, shared=PAGE), scores)


def decode_counts(config: Config) -> Counts:
    """One token further over a cache: both kinds in the latent space (the absorbed form), no query sharing what another reads.

    Raises:
      UserError: the config has no sparse attention.
    """
    a, top_k = config.model.attention, _top_k(config)
    scores, chosen = indexer(config.model.dim, a), absorbed(a, top_k)
    return Counts(absorbed(a), chosen, chosen, scores)


def _top_k(config: Config) -> int:
    if config.model.attention.sparse is None:
        raise UserError(f"the config {config.name!r} has no model.attention.sparse, whose cost is asked for; take deepseek_v32")
    return config.model.attention.sparse.top_k


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
