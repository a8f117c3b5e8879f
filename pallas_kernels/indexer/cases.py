"""Real shapes of the indexer, and what it must do at each: for tests, benchmarks and the static cost engine.

64 heads of 128, bfloat16 (DeepSeek-V3.2). Pages are scored for causal self-attention of one sequence, and floors count half of the pairs.
Scores, and the selection of tokens by them, are for a chunk of queries at the end of a sequence, and all pairs count.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.case import Case, Implementation
from pallas_kernels.choose import Kernels
from pallas_kernels.indexer import select
from pallas_kernels.indexer.choose import FAMILY
from pallas_kernels.visible import PAGE, Span

HEADS, SIZE = 64, 128
CHUNK, TOP_K = 512, 2048
TOKENS = (8192, 32768, 131072)
FIRST = TOKENS[0]

KERNELS: dict[str, Callable[..., Any]] = {
    "select_pages": lambda kernels, q, k, weight, span: select.select_pages(kernels, q, k, weight, span, TOP_K // PAGE, CHUNK),
    "index_scores": lambda kernels, q, k, weight, span: kernels.index_scores(q, k, weight, span),
    "select_tokens": lambda kernels, q, k, weight, span: select.select_tokens(kernels, q, k, weight, span, TOP_K, CHUNK),
}


def cases() -> list[Case]:
    """Every kernel at every number of tokens."""
    return [_case(kernel, tokens) for kernel in KERNELS for tokens in TOKENS]


def _case(kernel: str, tokens: int) -> Case:
    queries = tokens if kernel == "select_pages" else CHUNK
    pairs = queries * (tokens + 1) // 2 if queries == tokens else queries * tokens
    read = queries * HEADS * (SIZE * 2 + 4) + tokens * SIZE * 2
    written, what = {
        "select_pages": (queries // PAGE * TOP_K // PAGE * 4, "pages"),
        "index_scores": (queries * tokens * 4, "scores"),
        "select_tokens": (queries * TOP_K * 4, "tokens"),
    }[kernel]
    return Case(
        name=f"s{queries}_t{tokens}_j{HEADS}",
        kernel=kernel,
        direction="forward",
        build=partial(_build, kernel, queries, tokens),
        floor_bytes=read + written,
        floor_note=f"queries, keys and weights read, {what} written; 2 J I FLOPs a visible pair",
        floor_flops=2 * HEADS * SIZE * pairs,
        values=_visible,
    )


def _visible(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """With every key visible to queries that are fewer, and those up to its own to each of as many."""
    q, k = args[:2]
    queries, tokens = q.shape[1], k.shape[1]
    stop = jnp.arange(tokens) + 1 if queries == tokens else jnp.full(queries, tokens)
    return (*args[:3], Span(jnp.zeros((1, queries), jnp.int32), stop.astype(jnp.int32)[None]))


def _build(kernel: str, queries: int, tokens: int, implementation: Implementation) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    array: Any = jax.ShapeDtypeStruct
    q, k = array((1, queries, HEADS, SIZE), jnp.bfloat16), array((1, tokens, SIZE), jnp.bfloat16)
    span = Span(array((1, queries), jnp.int32), array((1, queries), jnp.int32))
    weight = array((1, queries, HEADS), jnp.float32)
    return partial(KERNELS[kernel], Kernels(FAMILY, implementation, False)), (q, k, weight, span)
