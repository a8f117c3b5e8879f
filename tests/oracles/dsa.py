"""DeepSeek Sparse Attention one query at a time, float64 NumPy, written from DeepSeek-V3.2 (arXiv 2512.02556, Eq. 1-4).

One sequence, without a batch axis. Letters: S queries, T keys, H heads of D unrotated, R rotated and V value dimensions, K latent, J heads
of I dimensions of the indexer. Who sees whom is a plain mask, bool [S, T]; what was chosen is a list of rising index arrays, one a query.
"""

import numpy as np

from oracles.mla import normed
from oracles.rope import rotate


def rotate_halves(x, position, frequencies):
    """One vector: pair (i, i + half) is turned by position * frequencies[i]. `oracles.rope.rotate` turns neighbouring pairs."""
    half = len(x) // 2
    pairs = (x[:half] + 1j * x[half:]) * np.exp(1j * position * frequencies)
    return np.concatenate([pairs.real, pairs.imag])


def rotated(x, positions, frequencies, turn, *, part):
    """[S, ..., dim]: `turn` on the dimensions `part` (a slice) of the last axis, the others as they are."""
    out = x.copy()
    for t in range(len(x)):
        for at in np.ndindex(x.shape[1:-1]):
            out[(t, *at, part)] = turn(x[(t, *at, part)], positions[t], frequencies)
    return out


def causal(segments):
    """Who sees whom in packed documents: bool [S, S]."""
    segments = np.asarray(segments)
    return np.tril(segments[:, None] == segments)


# The indexer.


def indexer_inputs(x, q_latent, p, positions, *, rope, frequencies, eps=1e-6, turn=rotate_halves):
    """q [S, J, I], k [S, I] and weight [S, J], which holds J^-0.5 I^-0.5. The first `rope` of the I dimensions are rotated.

    `p`: query [Q, J, I], key [C, I], key_norm and key_norm_bias [I], weight [C, J].
    """
    _, heads, width = p["query"].shape
    q = np.einsum("sq,qji->sji", q_latent, p["query"])
    k = x @ p["key"]
    k = k - k.mean(axis=-1, keepdims=True)
    k = k / np.sqrt((k * k).mean(axis=-1, keepdims=True) + eps) * p["key_norm"] + p["key_norm_bias"]
    q, k = (rotated(y, positions, frequencies, turn, part=slice(0, rope)) for y in (q, k))
    return q, k, x @ p["weight"] * heads**-0.5 * width**-0.5


def index_scores(q, k, weight, visible):
    """I[t, s] = sum_j weight[t, j] relu(q[t, j] . k[s]); -inf where not visible. [S, T]."""
    scores = np.full(visible.shape, -np.inf)
    for t, s in zip(*np.nonzero(visible)):
        scores[t, s] = weight[t] @ np.maximum(q[t] @ k[s], 0)
    return scores


def largest(scores, count):
    """Rising indices of the `count` largest scores of one row that are not -inf; of equal ones the lower index."""
    seen = np.flatnonzero(scores > -np.inf)
    return np.sort(seen[np.lexsort((seen, -scores[seen]))][:count])


def select_tokens(scores, top_k):
    return [largest(row, top_k) for row in scores]


def select_pages(scores, pages, page):
    """For each block of `page` queries rising pages: those of the block's last visible keys, then those of the largest visible score."""
    length, keys = scores.shape
    chosen = []
    for start in range(0, length, page):
        block = scores[start : start + page]
        of_page = np.array([block[:, k : k + page].max() for k in range(0, keys, page)])
        for row in block:
            if (row > -np.inf).any():
                of_page[np.flatnonzero(row > -np.inf)[-1] // page] = np.inf
        chosen.append(largest(of_page, pages))
    return chosen


def tokens_of_pages(chosen, visible, page):
    """The visible tokens of each query's block's pages."""
    return [
        np.array([s for c in chosen[t // page] for s in range(c * page, min((c + 1) * page, len(row))) if row[s]], int)
        for t, row in enumerate(visible)
    ]


def margin(scores, top_k):
    """Smallest distance between a score that is chosen and one that is not: what an error must stay below to choose the same. inf: none."""
    rows = [np.sort(row[row > -np.inf])[::-1] for row in scores]
    return min([row[top_k - 1] - row[top_k] for row in rows if len(row) > top_k], default=np.inf)


# Attention over what was chosen.


def sparse_mla(q_nope, q_rope, key_up, value_up, latent, chosen, *, scale):
    """Absorbed latent attention: out [S, H, V], log_total and top [S, H] (-inf for a query without keys, whose output is 0).

    q_nope [S, H, D], q_rope [S, H, R], key_up [K, H, D], value_up [K, H, V], latent [T, K+R] (normalised latent | rotated key).
    """
    length, heads = q_nope.shape[:2]
    rank = len(key_up)
    out = np.zeros((length, heads, value_up.shape[-1]))
    log_total, top = np.full((length, heads), -np.inf), np.full((length, heads), -np.inf)
    for t in range(length):
        if not len(chosen[t]):
            continue
        keys = latent[chosen[t]]
        for h in range(heads):
            absorbed = key_up[:, h] @ q_nope[t, h]
            logits = scale * (keys[:, :rank] @ absorbed + keys[:, rank:] @ q_rope[t, h])
            top[t, h] = logits.max()
            total = np.exp(logits - top[t, h]).sum()
            log_total[t, h] = top[t, h] + np.log(total)
            out[t, h] = np.exp(logits - log_total[t, h]) @ keys[:, :rank] @ value_up[:, h]
    return out, log_total, top


def probabilities(q_nope, q_rope, key_up, latent, chosen, *, scale):
    """The target of the indexer, mean over heads of the attention's probabilities, on the chosen keys of each query."""
    rank, target = len(key_up), []
    for t, own in enumerate(chosen):
        mean = np.zeros(len(own))
        for h in range(q_nope.shape[1]):
            logits = scale * (latent[own, :rank] @ (key_up[:, h] @ q_nope[t, h]) + latent[own, rank:] @ q_rope[t, h])
            weight = np.exp(logits - logits.max(initial=-np.inf))
            mean += weight / weight.sum() / q_nope.shape[1]
        target.append(mean)
    return target


def indexer_loss(scores, target, chosen):
    """Sum over queries of KL(target || softmax of the scores), both over the chosen keys; the dense warm-up chooses every visible key."""
    total = 0.0
    for row, p, own in zip(scores, target, chosen):
        if len(own):
            logits = row[own] - row[own].max()
            log_q = logits - np.log(np.exp(logits).sum())
            total += sum(a * (np.log(a) - b) for a, b in zip(p, log_q) if a > 0)
    return total


def dsa(x, p, indexer, positions, visible, *, nope, rope, kv_rank, eps, frequencies, temperature, top_k, turn=rotate_halves):
    """A whole layer: x [S, C] -> output [S, C], index scores [S, S], and what was chosen. `top_k=None` chooses every visible key.

    `p` maps the parameter names of latent attention to arrays, `indexer` those of the indexer. `turn` is the indexer's rotary layout.
    """
    q_latent = np.stack([normed(row @ p["query_down"], p["query_norm"], eps) for row in x])
    q = np.einsum("sq,qhd->shd", q_latent, p["query_up"])
    q = rotated(q, positions, frequencies, rotate, part=slice(nope, nope + rope))
    both = x @ p["latent"]
    c = np.stack([normed(row, p["latent_norm"], eps) for row in both[:, :kv_rank]])
    latent = rotated(np.concatenate([c, both[:, kv_rank:]], axis=1), positions, frequencies, rotate, part=slice(kv_rank, None))
    scores = index_scores(*indexer_inputs(x, q_latent, indexer, positions, rope=rope, frequencies=frequencies, turn=turn), visible)
    chosen = select_tokens(scores, len(x) if top_k is None else top_k)
    key_up, value_up = p["expand"][..., :nope], p["expand"][..., nope:]
    scale = temperature / np.sqrt(nope + rope)
    out, _, _ = sparse_mla(q[..., :nope], q[..., nope:], key_up, value_up, latent, chosen, scale=scale)
    return np.einsum("shv,hvc->sc", out, p["out"]), scores, chosen
