"""How much do cheaper choices of keys lose against the exact one? `mhc-jax recall [RUN]`, for random indexers and for that of a run.

The exact choice: each query's keys with the largest scores. Beside it the same number of keys
- in whole pages, which the queries of a block share (`pallas_kernels.indexer.select_pages`),
- binned: keys that are `bins` apart share a bin, of which the largest alone takes part (the partial reduction of arXiv 2206.14286, which is
  what `jax.lax.approx_max_k` runs on a TPU, and nowhere else). Here it is deterministic and the same on every platform.

Queries that see no more keys than are chosen leave nothing to choose and are not looked at.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.indexer import index_scores, select_pages, select_tokens
from pallas_kernels.visible import PAGE, Span, is_visible, mask_of_tokens, tokens_of_pages

Array = jax.Array

SHARES = (2, 4, 8)  # keys of a bin
RANDOM = (131_072, 2048, 64, 16, 32)  # keys, chosen, queries, heads of the indexer and their size


class Scored(NamedTuple):
    """What a choice is made from: the last S of T tokens of one sequence and what they see.

    q [1, S, J, I], k [1, T, I], weight [1, S, J] as `pallas_kernels.indexer` takes them; attention [1, S, T], the probabilities that the
    choice is to catch, None where there is no attention.
    """

    q: Array
    k: Array
    weight: Array
    span: Span
    attention: Array | None


class Recall(NamedTuple):
    """Means over queries: the share of the exact choice's keys that are found, and the attention that falls on what is chosen."""

    choice: str
    found: float
    attention: float | None


def recalls(scored: Scored, chosen: int) -> list[Recall]:
    """Every choice of `chosen` keys for each query; the exact one comes first."""
    keys = scored.k.shape[1]
    scores = index_scores(*scored[:4])
    exact = mask_of_tokens(select_tokens(*scored[:4], chosen), keys)
    masks = {"exact": exact}
    if chosen % PAGE == 0:
        pages = tokens_of_pages(select_pages(*scored[:4], chosen // PAGE), scored.span)
        masks[f"pages of {PAGE}"] = mask_of_tokens(pages, keys)
    for share in SHARES:
        if keys // share >= chosen:
            masks[f"{share} keys a bin"] = binned(scores, chosen, -(-keys // share))
    counted = is_visible(scored.span, keys).sum(axis=-1) > chosen

    def mean(of_query: Array) -> float:
        return float(jnp.where(counted, of_query, 0).sum() / counted.sum())

    def of(mask: Array) -> float | None:
        return None if scored.attention is None else mean(jnp.where(mask, scored.attention, 0).sum(axis=-1))

    return [Recall(name, mean((mask & exact).sum(axis=-1) / chosen), of(mask)) for name, mask in masks.items()]


def binned(scores: Array, chosen: int, bins: int) -> Array:
    """bool, as scores [..., T]: the `chosen` largest of the largest of each bin, fewer where fewer are not -inf."""
    keys = scores.shape[-1]
    missing = -keys % bins
    padded = jnp.pad(scores, [(0, 0)] * (scores.ndim - 1) + [(0, missing)], constant_values=-jnp.inf)
    of_bins = padded.reshape(*scores.shape[:-1], -1, bins)
    place = jnp.argmax(of_bins, axis=-2)
    value, best = jax.lax.top_k(of_bins.max(axis=-2), chosen)
    key = jnp.take_along_axis(place, best, axis=-1) * bins + best
    key = jnp.where(value > -jnp.inf, key, keys + missing)
    return jnp.zeros(scores.shape, bool).at[(*jnp.indices(key.shape)[:-1], key)].set(True, mode="drop")


def expected(part: float, share: int) -> float:
    """The share of the exact choice that is found with so many keys a bin, if scores lie at random and `part` of all keys is chosen.

    A bin yields one key if any of its keys belongs to the exact choice.
    """
    return (1 - (1 - part) ** share) / (share * part)


def random_indexer(seed: int = 0) -> Scored:
    """The last queries of a long sequence, all of normal numbers: scores without any order."""
    keys, _, queries, heads, size = RANDOM
    q, k, weight = (
        jax.random.normal(key, shape)
        for key, shape in zip(jax.random.split(jax.random.key(seed), 3), ((1, queries, heads, size), (1, keys, size), (1, queries, heads)))
    )
    stop = jnp.arange(keys - queries + 1, keys + 1, dtype=jnp.int32)[None]
    return Scored(q, k, weight, Span(jnp.zeros_like(stop), stop), None)


def random_recalls() -> list[tuple[str, int, int, Recall]]:
    """Rows of `table`."""
    return [("random", RANDOM[0], RANDOM[1], found) for found in recalls(random_indexer(), RANDOM[1])]


def table(rows: Sequence[tuple[str, int, int, Recall]]) -> Iterator[str]:
    """Markdown, a line at a time: (what was scored, keys, chosen, recall)."""
    yield "| scores | keys | chosen | choice | of the exact choice's keys, % | attention on it, % | expected of bins at random, % |"
    yield "|---|---|---|---|---|---|---|"
    for data, keys, chosen, found in rows:
        words = found.choice.split()
        by_chance = f"{100 * expected(chosen / keys, int(words[0])):.1f}" if words[-1] == "bin" else ""
        attention = "" if found.attention is None else f"{100 * found.attention:.1f}"
        yield f"| {data} | {keys:,} | {chosen:,} | {found.choice} | {100 * found.found:.1f} | {attention} | {by_chance} |"


def mean_of(several: Sequence[list[Recall]]) -> list[Recall]:
    """The mean over sequences, choice by choice."""
    return [
        Recall(
            found[0].choice,
            float(np.mean([one.found for one in found])),
            None if found[0].attention is None else float(np.mean([one.attention for one in found if one.attention is not None])),
        )
        for found in zip(*several)
    ]
