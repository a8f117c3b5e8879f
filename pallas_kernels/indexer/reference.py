"""The specification: what every implementation computes, in plain jnp, with no thought of memory or speed. Differentiated by JAX.

Source: arXiv 2512.02556, section 2.1, Eq. 1-4. Run it with float64 arrays for an oracle.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.visible import PAGE, Selected, Span, is_visible

Array = jax.Array


def index_scores(q: Array, k: Array, weight: Array, span: Span) -> Array:
    """q [B, S, J, I], k [B, T, I], weight [B, S, J] -> sum_j weight[t, j] relu(q[t, j] . k[s]), [B, S, T], -inf where not visible."""
    dots = jnp.einsum("bsji,bti->bsjt", wide(q), wide(k))
    scores = jnp.sum(jnp.maximum(dots, 0) * wide(weight)[..., None], axis=2)
    return jnp.where(is_visible(span, k.shape[1]), scores, -jnp.inf)


def select_tokens(scores: Array, top_k: int) -> Selected:
    """Of scores [B, S, T]: the top_k largest that are visible, ties to the lower index, by a stable sort of everything."""
    keys = scores.shape[-1]
    top_k = min(top_k, keys)
    count = jnp.minimum(jnp.sum(scores > -jnp.inf, axis=-1, dtype=jnp.int32), top_k)
    best = jnp.argsort(-scores, axis=-1, stable=True)[..., :top_k].astype(jnp.int32)
    valid = jnp.arange(top_k)[None, None] < count[..., None]
    rising = jnp.sort(jnp.where(valid, best, keys), axis=-1)
    return Selected(jnp.where(valid, rising, 0), count)


def select_pages(scores: Array, span: Span, pages: int) -> Selected:
    """Of scores [B, S, T]: for each PAGE queries the pages with the largest scores; those of the queries' own positions come first."""
    batch, length, keys = scores.shape
    queries, blocks = -(-length // PAGE), -(-keys // PAGE)
    padding = ((0, 0), (0, queries * PAGE - length), (0, blocks * PAGE - keys))
    padded = jnp.pad(scores, padding, constant_values=-jnp.inf)
    of_page = padded.reshape(batch, queries, PAGE, blocks, PAGE).max(axis=(2, 4))
    own = jnp.where(span.stop > span.first, (span.stop - 1) // PAGE, -1)
    own = jnp.pad(own, padding[:2], constant_values=-1).reshape(batch, queries, PAGE, 1)
    is_own = (own == jnp.arange(blocks)[None, None, None]).any(axis=2)
    return select_tokens(jnp.where(is_own, jnp.inf, of_page), pages)


def divergence(p: Array, scores: Array) -> Array:
    """Sum over queries of KL(p || softmax(scores)), both [B, S, T]; p sums to one over keys, or to zero for a query that sees none."""
    seen = scores > -jnp.inf
    log_softmax = jax.nn.log_softmax(jnp.where(seen, scores, -1e300), axis=-1)
    return jnp.sum(jax.scipy.special.xlogy(p, p) - jnp.where(seen, p * log_softmax, 0))


def wide(x: Array) -> Array:
    """The array in float32, or in its own type where that is wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
