"""Which keys a query may see, and which were chosen for it: what the attention families share. No scores and no attention here.

The keys that a query may see are always one span: causal, within its own document, within what a cache holds. So masks are two integers a
query and never a matrix.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

PAGE = 64  # keys of a page, and queries of a block that share their pages


class Span(NamedTuple):
    """Query i sees the keys first[i] <= j < stop[i]; none where the two are equal. Both int32 [B, S]."""

    first: jax.Array
    stop: jax.Array


class Selected(NamedTuple):
    """Keys (or pages of keys) chosen for each query (or block of PAGE queries).

    index: int32 [B, Q, k], rising; only the first `count` are valid, the others hold 0, so that any of them may be gathered.
    count: int32 [B, Q].
    """

    index: jax.Array  # type: ignore[assignment]  # a tuple has methods of these names
    count: jax.Array  # type: ignore[assignment]

    @property
    def valid(self) -> jax.Array:
        """bool [B, Q, k]."""
        return jnp.arange(self.index.shape[-1])[None, None] < self.count[..., None]


def causal_span(segment_ids: jax.Array) -> Span:
    """Of packed documents, segment ids int [B, S], equal within a document: the tokens up to one's own of one's own document."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None], segment_ids.shape)
    begins = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return Span(jax.lax.cummax(jnp.where(begins, index, 0), axis=1), index + 1)


def is_visible(span: Span, keys: int) -> jax.Array:
    """bool [B, S, T]: the mask that a span stands for, for oracles and small blocks."""
    j = jnp.arange(keys, dtype=jnp.int32)[None, None]
    return (j >= span.first[..., None]) & (j < span.stop[..., None])


def tokens_of_pages(pages: Selected, span: Span) -> Selected:
    """The tokens that each query sees in the pages of its block: index [B, S, PAGE * pages], with the visible ones at the front, rising."""
    length, count = span.first.shape[1], pages.index.shape[-1]
    token = pages.index[..., None] * PAGE + jnp.arange(PAGE, dtype=jnp.int32)[None, None, None]
    token = jnp.where(pages.valid[..., None], token, -1).reshape(*pages.index.shape[:2], count * PAGE)
    token = jnp.repeat(token, PAGE, axis=1)[:, :length]
    seen = (token >= span.first[..., None]) & (token < span.stop[..., None]) & (token >= 0)
    order = jnp.argsort(~seen, axis=-1, stable=True)
    index = jnp.where(jnp.take_along_axis(seen, order, axis=-1), jnp.take_along_axis(token, order, axis=-1), 0)
    return Selected(index, seen.sum(axis=-1, dtype=jnp.int32))


def mask_of_tokens(tokens: Selected, keys: int) -> jax.Array:
    """bool [B, S, T]: which of T keys were chosen for each query, for oracles and where nearly all of them are looked at anyway."""
    none = jnp.zeros((*tokens.index.shape[:2], keys), bool)
    b, s = (jnp.arange(size)[:, None] for size in none.shape[:2])
    return none.at[b[:, :, None], s[None], tokens.index].max(tokens.valid, mode="promise_in_bounds")


def masking_pays(keys: int, chosen: int) -> bool:
    """Whether matrix products with all keys, most of them masked, cost XLA less than gathering the chosen ones for every query.

    Work stays in proportion to the chosen keys. On a CPU, a gathered row costs as much as about ten of such a product.
    """
    return keys <= 4 * chosen
