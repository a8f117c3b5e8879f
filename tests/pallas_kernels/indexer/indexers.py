"""Random indexers and attention beside them, and numpy oracles in float64 that share nothing with the package."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.visible import Selected, Span


class Indexer(NamedTuple):
    q: Any
    k: Any
    weight: Any
    span: Span


def indexer(batch: int, queries: int, keys: int, heads: int, size: int, dtype: Any = jnp.float32, seed: int = 0) -> Indexer:
    """Weights of both signs. Sequence 0 is causal, at the end of the keys; the others are packed documents, some queries seeing nothing."""
    rng = np.random.default_rng(seed)
    stop = np.broadcast_to(np.arange(queries) + 1 + keys - queries, (batch, queries)).copy()
    first = np.zeros_like(stop)
    for b in range(1, batch):
        begins = np.sort(rng.choice(keys, 4, replace=False))
        first[b] = np.max(np.where(begins[None] < stop[b][:, None], begins[None], 0), axis=1)
        blind = rng.choice(queries, max(queries // 8, 1), replace=False)
        stop[b, blind] = first[b, blind]
    span = Span(jnp.asarray(first, jnp.int32), jnp.asarray(stop, jnp.int32))
    q = jnp.asarray(rng.standard_normal((batch, queries, heads, size)), dtype)
    k = jnp.asarray(rng.standard_normal((batch, keys, size)), dtype)
    weight = jnp.asarray(rng.standard_normal((batch, queries, heads)) / (heads * size) ** 0.5, jnp.promote_types(dtype, jnp.float32))
    return Indexer(q, k, weight, span)


def scores_of(x: Indexer) -> np.ndarray:
    """[B, S, T] float64, -inf where not visible."""
    q, k, weight = (np.asarray(a, np.float64) for a in x[:3])
    found = np.zeros((*q.shape[:2], k.shape[1]))
    for j in range(q.shape[2]):
        found += weight[:, :, j, None] * np.maximum(q[:, :, j] @ k.swapaxes(1, 2), 0)
    return np.where(visible(x.span, k.shape[1]), found, -np.inf)


def visible(span: Span, keys: int) -> np.ndarray:
    first, stop = (np.asarray(a)[..., None] for a in span)
    return (np.arange(keys) >= first) & (np.arange(keys) < stop)


def largest(scores: np.ndarray, top_k: int) -> list[list[list[int]]]:
    """For each row of [B, Q, T] the indices of the top_k largest that are not -inf, ties to the lower index, rising."""
    return [[sorted(sorted(np.flatnonzero(row > -np.inf), key=lambda t: (-row[t], t))[:top_k]) for row in rows] for rows in scores]


def check_selected(got: Selected, wanted: list[list[list[int]]], width: int) -> None:
    index, count = np.asarray(got.index), np.asarray(got.count)
    assert index.shape == (*count.shape, width) and index.dtype == count.dtype == np.int32
    for b, rows in enumerate(wanted):
        for s, row in enumerate(rows):
            assert count[b, s] == len(row), (b, s)
            np.testing.assert_array_equal(index[b, s], row + [0] * (width - len(row)), err_msg=f"sequence {b}, query {s}")


class Main(NamedTuple):
    """Attention's arrays, tokens before heads."""

    q_nope: Any
    q_rope: Any
    key_up: Any
    latent: Any
    scale: float


def main_attention(batch: int, queries: int, keys: int, heads: int, width: int, rotated: int, rank: int, dtype: Any, seed: int = 1) -> Main:
    rng = np.random.default_rng(seed)

    def normal(*shape, std=1.0):
        return jnp.asarray(std * rng.standard_normal(shape), dtype)

    sizes = (normal(batch, queries, heads, width), normal(batch, queries, heads, rotated), normal(rank, heads, width, std=rank**-0.5))
    return Main(*sizes, normal(batch, keys, rank + rotated), float((width + rotated) ** -0.5) * 2)


def logits_of(main: Main) -> np.ndarray:
    """[B, H, S, T] float64."""
    q_nope, q_rope, key_up, latent = (np.asarray(a, np.float64) for a in main[:4])
    rank = key_up.shape[0]
    keys = np.einsum("btk,khd->bthd", latent[..., :rank], key_up)
    dots = np.einsum("bshd,bthd->bhst", q_nope, keys) + np.einsum("bshr,btr->bhst", q_rope, latent[..., rank:])
    return dots * main.scale


def softmax(x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Over the last axis where the mask holds, zeros elsewhere and in rows without any."""
    x = np.where(mask, x, -np.inf)
    top = np.where(mask.any(-1, keepdims=True), x.max(-1, keepdims=True), 0)
    terms = np.exp(x - top)
    return terms / np.maximum(terms.sum(-1, keepdims=True), 1e-300)


def loss_of(x: Indexer, main: Main, mask: np.ndarray) -> float:
    """Sum of KL over the keys of mask [B, S, T], in float64."""
    p = softmax(logits_of(main), mask[:, None]).mean(axis=1)
    r = softmax(scores_of(Indexer(*x[:3], everything(x))), mask)
    present = p > 0
    return float(np.sum(p[present] * (np.log(p[present]) - np.log(r[present]))))


def everything(x: Indexer) -> Span:
    shape, keys = x.q.shape[:2], x.k.shape[1]
    return Span(jnp.zeros(shape, jnp.int32), jnp.full(shape, keys, jnp.int32))


def heads_first(main: Main) -> dict[str, jax.Array]:
    """The arguments of the dense loss beside the indexer's: keys of every head, and the log-sum-exp over the causal keys of `first`."""
    rank = main.key_up.shape[0]
    k_nope = jnp.einsum("btk,khd->bhtd", main.latent[..., :rank], main.key_up)
    return {
        "q_nope": main.q_nope.swapaxes(1, 2),
        "q_rope": main.q_rope.swapaxes(1, 2),
        "k_nope": k_nope,
        "k_rope": main.latent[..., rank:],
    }
