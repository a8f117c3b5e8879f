"""Multi-head latent attention (MLA): dense or sparse over a sequence, and one step further over a cache of latents.

Sources: DeepSeek-V2 (arXiv 2405.04434, Eq. 9-19), with the order of norms and splits of the DeepSeek-V3 inference code; DeepSeek Sparse
Attention (arXiv 2512.02556, section 2.1). The attention itself, and the choice of keys, are kernels' work (`pallas_kernels`).
"""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from mhc_jax.config import AttentionConfig, ModelConfig
from mhc_jax.nn.indexer import Indexer
from mhc_jax.nn.latent_attention import expanded_attention, latent_attention
from mhc_jax.nn.linear import project
from mhc_jax.nn.module import Module, Spec, normal
from mhc_jax.nn.norm import rms_norm, wide_dtype
from mhc_jax.nn.rotary import rotate, softmax_temperature
from mhc_jax.parallel.rules import Rules
from mhc_jax.parallel.shards import constrained, on_shards
from pallas_kernels.attention import dense_attention
from pallas_kernels.indexer import dense_indexer_loss, select_pages, select_tokens, sparse_indexer_loss
from pallas_kernels.sparse_attention import sparse_mla
from pallas_kernels.visible import PAGE, Selected, Span, causal_span, tokens_of_pages

# How latents, spans and the indexer's queries, weights and keys are split where keys are chosen.
OF_INDEXER = (("batch", None, None), *(("batch", "positions", *rest) for rest in ((), (), (None, None), (None,))), ("batch", None, None))


class Report(NamedTuple):
    """What attention tells beside its output."""

    max_logit: Float[Array, ""]  # largest attention logit; no gradient
    indexer_loss: Float[Array, ""]  # nats, summed over tokens: KL of the indexer from the attention; 0 without an indexer


class LatentCache(NamedTuple):
    """What decoding keeps of T earlier tokens."""

    latent: Float[Array, "B T K+R"]  # normalised latent, and the rotated key shared by all heads
    index_keys: Float[Array, "B T I"] | None  # of the indexer

    @classmethod
    def empty(cls, config: AttentionConfig, batch: int, capacity: int, dtype: jnp.dtype) -> "LatentCache":
        """Room for `capacity` tokens of each of `batch` sequences."""
        own = config.sparse
        index_keys = None if own is None or own.stage == "warmup" else jnp.zeros((batch, capacity, own.index_dim), dtype)
        return cls(jnp.zeros((batch, capacity, config.kv_rank + config.rope_dim), dtype), index_keys)


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
    indexer: Indexer | None  # chooses keys; None: attention is dense

    SPECS: ClassVar = {
        "query": Spec(("embed", "heads", None), decay=True),
        "query_down": Spec(("embed", None), decay=True),
        "query_norm": Spec((None,)),
        "query_up": Spec(("rank", "heads", None), decay=True),
        "latent": Spec(("embed", None), decay=True),
        "latent_norm": Spec((None,)),
        "expand": Spec(("rank", "heads", None), decay=True),
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
        self.indexer = None if a.sparse is None else Indexer(config, jax.random.fold_in(key, 5))
        self.config: AttentionConfig = a
        self.norm_eps: float = config.norm_eps

    @property
    def scale(self) -> float:
        """Of the logits, in either form: 1 / sqrt(D + R), times YaRN's temperature."""
        return (self.config.nope_dim + self.config.rope_dim) ** -0.5 * softmax_temperature(self.config.rope)

    def __call__(
        self, x: Float[Array, "B S C"], positions: Int[Array, "B S"], segment_ids: Int[Array, "B S"], rules: Rules = Rules()
    ) -> tuple[Float[Array, "B S C"], Report]:
        """Attention output of whole sequences, each token seeing its document up to itself."""
        x = constrained(x, rules, "batch", "positions", None)
        span = causal_span(segment_ids)
        q_nope, q_rope, q_latent = self._queries(x, positions)
        latent = self._latents(x, positions)
        index = None
        if self.indexer is not None:
            # The indexer learns from its own loss alone, and nothing else learns from that.
            detached, q_detached = jax.lax.stop_gradient((x, q_latent))
            assert q_detached is not None
            index = (*self.indexer.queries(detached, q_detached, positions), self.indexer.keys(detached, positions))
        own = self.config.sparse
        if own is None or own.stage == "warmup" or x.shape[1] <= own.top_k:  # up to top_k keys all of them are chosen
            attended, tops, losses = self._dense(q_nope, q_rope, latent, span, index, rules)
        else:
            assert index is not None
            attended, tops, losses = self._sparse(q_nope, q_rope, latent, span, index, rules)
        y = self._projected(constrained(attended, rules, "batch", "positions", "heads", None))
        return y, Report(jax.lax.stop_gradient(tops.max()), losses.sum())

    def decode(
        self, x: Float[Array, "B S C"], positions: Int[Array, "B S"], cache: LatentCache, rules: Rules = Rules()
    ) -> tuple[Float[Array, "B S C"], LatentCache]:
        """Attention output of S more tokens of each sequence, and the cache with them.

        Row p of a cache is the token at position p, and a token sees the rows up to its own. A position beyond the cache writes nothing:
        such tokens fill up sequences that are shorter than others, and their output means nothing.
        """
        q_nope, q_rope, q_latent = self._queries(x, positions)
        whole = ("batch", None, None)

        def write(kept: Array, new: Array, positions: Array) -> Array:
            rows = jnp.arange(len(kept))[:, None]
            return kept.at[rows, positions].set(new.astype(kept.dtype), mode="drop", wrap_negative_indices=False)

        written = on_shards(write, rules, given=(whole, whole, whole[:2]), results=whole)
        latent = written(cache.latent, self._latents(x, positions), positions)
        cache = cache._replace(latent=latent)
        span = Span(jnp.zeros_like(positions), jnp.minimum(positions + 1, latent.shape[1]))
        if cache.index_keys is not None:
            assert self.indexer is not None and q_latent is not None
            index_keys = written(cache.index_keys, self.indexer.keys(x, positions), positions)
            cache = cache._replace(index_keys=index_keys)
            index = (*self.indexer.queries(x, q_latent, positions), index_keys)
            attended = self._to_chosen(q_nope, q_rope, latent, span, index, rules)[0]
        elif self.qk_scales is None:
            attended = latent_attention(q_nope, q_rope, *self._ups(latent.dtype), latent, span, scale=self.scale)
        else:
            attended = expanded_attention(q_nope, q_rope, *self._expanded(latent), span, scale=self.scale)
        return self._projected(attended), cache

    def _queries(self, x: Array, positions: Array) -> tuple[Float[Array, "B S H D"], Float[Array, "B S H R"], Float[Array, "B S Q"] | None]:
        """Both parts of the queries, and the normalised latent that they were made from, if any."""
        a, eps, q_latent = self.config, self.norm_eps, None
        if self.query is not None:
            q = project(x, self.query)
        else:
            assert self.query_down is not None and self.query_up is not None
            q_latent = rms_norm(project(x, self.query_down), self.query_norm, eps)
            q = project(q_latent, self.query_up)
        q_nope, q_rope = jnp.split(q, [a.nope_dim], axis=-1)
        if self.qk_scales is not None:
            # The two parts are normalised apart, so that the rotated key stays shared by all heads.
            q_nope, q_rope = (rms_norm(q, w, eps) for q, w in zip((q_nope, q_rope), jnp.split(self.qk_scales[0], [a.nope_dim])))
        return q_nope, rotate(q_rope, positions, a.rope), q_latent

    def _latents(self, x: Array, positions: Array) -> Float[Array, "B S E"]:
        """Of each token the normalised latent and the rotated key, E = K + R numbers."""
        a, eps = self.config, self.norm_eps
        latent, k_rope = jnp.split(project(x, self.latent), [a.kv_rank], axis=-1)
        if self.qk_scales is not None:
            k_rope = rms_norm(k_rope, self.qk_scales[1, a.nope_dim :], eps)
        return jnp.concatenate([rms_norm(latent, self.latent_norm, eps), rotate(k_rope, positions, a.rope)], axis=-1)

    def _expanded(self, latent: Array) -> tuple[Float[Array, "B S H D"], Float[Array, "B S R"], Float[Array, "B S H V"]]:
        """Keys, rotated key and values of all heads."""
        a = self.config
        latent, k_rope = jnp.split(latent, [a.kv_rank], axis=-1)
        k_nope, value = jnp.split(project(latent, self.expand), [a.nope_dim], axis=-1)
        if self.qk_scales is not None:
            k_nope = rms_norm(k_nope, self.qk_scales[1, : a.nope_dim], self.norm_eps)
        return k_nope, k_rope, value

    def _ups(self, dtype: jnp.dtype) -> tuple[Float[Array, "K H D"], Float[Array, "K H V"]]:
        """What multiplies a latent into keys, and into values."""
        key_up, value_up = jnp.split(self.expand.astype(dtype), [self.config.nope_dim], axis=-1)
        return key_up, value_up

    def _projected(self, attended: Float[Array, "B S H V"]) -> Float[Array, "B S C"]:
        return project(attended.reshape(*attended.shape[:2], -1), self.out.reshape(-1, self.out.shape[-1]))

    @property
    def _by_pages(self) -> bool:
        return self.config.sparse is not None and self.config.sparse.granularity == "page"

    def _selected(self, index: tuple[Array, Array, Array], span: Span) -> Selected:
        """The keys, or pages of keys, that the indexer's queries, weights and keys choose."""
        own = self.config.sparse
        assert own is not None
        q, weight, k = index
        if self._by_pages:
            return select_pages(q, k, weight, span, own.top_k // PAGE, query_chunk=own.query_chunk)
        return select_tokens(q, k, weight, span, own.top_k, query_chunk=own.query_chunk)

    def _dense(
        self, q_nope: Array, q_rope: Array, latent: Array, span: Span, index: tuple[Array, ...] | None, rules: Rules
    ) -> tuple[Array, Array, Array]:
        """Output [B, S, H, V], largest logits and the indexer's losses of shards.

        Where sequences are split, devices exchange positions for heads: each attends for some heads over whole sequences, so that causality
        gives all of them the same work. Of keys and values only latents travel.
        """
        a = self.config
        k_nope, k_rope, value = self._expanded(constrained(latent, rules, "batch", None, None))
        args = [x.swapaxes(1, 2) for x in (q_nope, q_rope, k_nope)] + [k_rope, value.swapaxes(1, 2)]  # heads before positions
        heads, whole = ("batch", "all_heads", None, None), ("batch", None, None)

        def attend(*args: Array) -> tuple[Array, Array, Array]:
            found = dense_attention(*args, scale=self.scale, query_block=a.query_block)
            return found.out, found.top.max(axis=(1, 2))[:, None], found.log_total

        results = heads, ("batch", "all_heads"), ("batch", "all_heads", None)
        sharded = on_shards(attend, rules, given=(heads, heads, heads, whole, heads, whole[:2]), results=results)
        out, tops, log_total = sharded(*args, span.first)
        losses = jnp.zeros(1, wide_dtype(q_nope))
        if index is not None and a.sparse is not None:
            chunk = a.sparse.query_chunk

            def loss(q: Array, weight: Array, k: Array, *detached: Array) -> Array:
                return dense_indexer_loss(q, k, weight, *detached, scale=self.scale, query_chunk=chunk)[None]

            # All heads together are what the indexer learns, so devices that share sequences compute the same.
            detached = jax.lax.stop_gradient((*args[:4], log_total, span.first))
            given = [("batch", *[None] * (x.ndim - 1)) for x in (*index, *detached)]
            losses = on_shards(loss, rules, given=given, results=("batch",))(*index, *detached)
        return out.swapaxes(1, 2), tops, losses

    def _sparse(
        self, q_nope: Array, q_rope: Array, latent: Array, span: Span, index: tuple[Array, ...], rules: Rules
    ) -> tuple[Array, Array, Array]:
        """The same over the keys that the indexer chooses."""
        assert self.config.sparse is not None
        chunk, own = self.config.sparse.query_chunk, ("batch", "positions")
        chosen: tuple[tuple[str | None, ...], ...] = ((*own, None), own)
        out, tops, *selected = self._to_chosen(q_nope, q_rope, latent, span, index, rules)

        def loss(key_up, q_nope, q_rope, latent, first, stop, q, weight, k, *selected):
            span, found = Span(first, stop), Selected(*selected)
            tokens, main = tokens_of_pages(found, span) if self._by_pages else found, (q_nope, q_rope, key_up, latent)
            return sparse_indexer_loss(q, k, weight, *main, tokens, scale=self.scale, query_chunk=chunk)[None, None]

        detached = jax.lax.stop_gradient((self._ups(latent.dtype)[0], q_nope, q_rope, latent))
        given = (None, *((*own, None, None),) * 2, *OF_INDEXER, *chosen)
        losses = on_shards(loss, rules, given=given, results=own)(*detached, *span, *index, *selected)
        return out, tops, losses

    def _to_chosen(
        self, q_nope: Array, q_rope: Array, latent: Array, span: Span, index: tuple[Array, ...], rules: Rules
    ) -> tuple[Array, ...]:
        """Output [B, S, H, V], largest logits and the keys that were chosen; every device for its own queries, over all their latents."""
        assert self.config.sparse is not None
        chunk, own = self.config.sparse.query_chunk, ("batch", "positions")

        def attend(key_up, value_up, q_nope, q_rope, latent, first, stop, q, weight, k):
            span = Span(first, stop)
            selected = self._selected(jax.lax.stop_gradient((q, weight, k)), span)
            found = sparse_mla(
                q_nope, q_rope, key_up, value_up, latent, selected, span, scale=self.scale, pages=self._by_pages, query_chunk=chunk
            )
            return found.out, found.top.max(axis=(1, 2))[:, None, None], *selected

        ups, by_heads = (None, "heads", None), (*own, "heads", None)
        results = (by_heads, (*own, "heads"), (*own, None), own)
        sharded = on_shards(attend, rules, given=(ups, ups, by_heads, by_heads, *OF_INDEXER), results=results)
        return sharded(*self._ups(latent.dtype), q_nope, q_rope, latent, *span, *index)
