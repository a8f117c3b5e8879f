"""The indexer on Hopper GPUs (Pallas Mosaic GPU). Held to float64 and timed on an H200.

scores      the kernel that scores a tile of queries and keys; what is largest, XLA finds
"""

import jax
import jax.numpy as jnp

from pallas_kernels.indexer import xla
from pallas_kernels.indexer.gpu.scores import score
from pallas_kernels.visible import PAGE, Span

Array = jax.Array

WIDEST = 256  # dimensions of a head that 256 keys leave room for


def misfit(q: Array) -> str | None:
    """What about queries q [B, S, J, I] these kernels cannot take, besides what none can."""
    if q.shape[3] > WIDEST:
        return f"I is {q.shape[3]}; the GPU kernels take up to {WIDEST}"
    return None


def index_scores(q: Array, k: Array, weight: Array, span: Span, *, interpret: bool = False) -> Array:
    """As `xla.index_scores`."""
    return score(q, k, weight, span, False, interpret)


def page_scores(q: Array, k: Array, weight: Array, span: Span, query_chunk: int, *, interpret: bool = False) -> Array:
    """As `xla.page_scores`; scores of tokens never leave registers, so the queries are not cut into chunks."""
    del query_chunk
    found = score(q, k, weight, span, True, interpret)
    missing = -q.shape[1] % PAGE
    found = jnp.pad(found, ((0, 0), (0, 0), (0, missing)), constant_values=-jnp.inf)
    return found.reshape(*found.shape[:2], -1, PAGE).max(axis=-1).swapaxes(1, 2)


def top_indices(scores: Array, count: int, *, interpret: bool = False) -> Array:
    """As `xla.top_indices`, by XLA."""
    del interpret
    return xla.top_indices(scores, count)
