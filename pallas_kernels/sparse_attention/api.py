"""What a user calls: one signature for every platform, differentiable, and bad input refused."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.case import Implementation
from pallas_kernels.sparse_attention.choose import choose
from pallas_kernels.sparse_attention.chunks import attend, plan_of
from pallas_kernels.sparse_attention.spec import Keys, SparseAttended, Weights
from pallas_kernels.visible import PAGE, Selected, Span

Array = jax.Array


def sparse_mla(
    q_nope: Array,
    q_rope: Array,
    key_up: Array,
    value_up: Array,
    latent: Array,
    selected: Selected,
    span: Span,
    *,
    scale: float,
    pages: bool = False,
    query_chunk: int = 512,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> SparseAttended:
    """Multi-head latent attention to selected keys, in its multi-query form (arXiv 2512.02556; arXiv 2405.04434, section 2.1).

    With latents c and rotated keys r of the keys that a query attends to, and q~ = q_nope . key_up of a head:
    P = softmax((q~ . c + q_rope . r) * scale) in float32 or wider, out = (P c) . value_up. A query without keys gets 0.

    The gradient of `out` is the same bits in every run. No array of [S, T] or [S, k, K+R] exists, forward or backward: the queries are
    worked on in chunks, whose attention the backward pass computes again.

    Args:
      q_nope: [B, S, H, D] and q_rope [B, S, H, R], queries.
      key_up: [K, H, D] and value_up [K, H, V], the projections of the latent to every head's keys and values.
      latent: [B, T, K+R], normalised latents and the rotated key of every token; all of these have one floating type.
      selected: the keys of every query (`Selected` [B, S, k], each of them visible and in [0, T)), or with `pages` the pages of every
        block of PAGE queries ([B, ceil(S / PAGE), p], in [0, ceil(T / PAGE))), of which a query attends to the tokens that it sees. All
        distinct and rising: gradients are added up by where they lie.
      span: what every query sees, [B, S]; not looked at without `pages`.
      scale: of the logits.
      query_chunk: the most queries that are worked on at once, rounded up to a multiple of PAGE with `pages`; in XLA memory may bound it
        further.
      implementation: "tpu" (Pallas Mosaic TPU), "gpu" (Pallas Mosaic GPU), "xla" (any platform and shape), None for what the platform has.
      interpret: runs a kernel step by step on any platform, for tests.

    Raises:
      ValueError: a shape, a type or the platform does not fit; the message says what would.
    """
    _check(q_nope, q_rope, key_up, value_up, latent, selected, span, pages, query_chunk)
    kernels = choose(q_rope, latent, key_up.shape[0], selected, implementation, interpret, pages=pages)
    plans = (
        plan_of(kernels, q_rope, latent, selected.index.shape[-1], scale=scale, pages=pages, query_chunk=query_chunk, backward=backward)
        for backward in (False, True)
    )
    return attend(*plans, q_nope, q_rope, Weights(key_up, value_up), latent, Keys(*selected, *span))


def _check(
    q_nope: Array,
    q_rope: Array,
    key_up: Array,
    value_up: Array,
    latent: Array,
    selected: Selected,
    span: Span,
    pages: bool,
    query_chunk: int,
) -> None:
    if q_nope.ndim != 4 or q_rope.ndim != 4:
        raise ValueError(f"q_nope has shape {q_nope.shape} and q_rope {q_rope.shape}; [B, S, H, D] and [B, S, H, R] are needed")
    if not jnp.issubdtype(q_nope.dtype, jnp.floating):
        raise ValueError(f"q_nope has type {q_nope.dtype}; a floating type is needed")
    if key_up.ndim != 3 or value_up.ndim != 3 or latent.ndim != 3 or selected.index.ndim != 3:
        raise ValueError(
            f"key_up, value_up, latent and selected.index have shapes {key_up.shape}, {value_up.shape}, {latent.shape} and "
            f"{selected.index.shape}; [K, H, D], [K, H, V], [B, T, K+R] and [B, Q, k] are needed"
        )
    batch, length, heads, nope = q_nope.shape
    rank, rope, blocks = key_up.shape[0], q_rope.shape[-1], -(-length // PAGE) if pages else length
    floating, whole = q_nope.dtype, jnp.dtype(jnp.int32)
    wanted: dict[str, tuple[Array, tuple[int, ...], Any]] = {
        "q_rope": (q_rope, (batch, length, heads, rope), floating),
        "key_up": (key_up, (rank, heads, nope), floating),
        "value_up": (value_up, (rank, heads, value_up.shape[-1]), floating),
        "latent": (latent, (batch, latent.shape[1], rank + rope), floating),
        "selected.index": (selected.index, (batch, blocks, selected.index.shape[-1]), whole),
        "selected.count": (selected.count, (batch, blocks), whole),
        "span.first": (span.first, (batch, length), whole),
        "span.stop": (span.stop, (batch, length), whole),
    }
    for name, (array, shape, dtype) in wanted.items():
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(
                f"{name} is {array.dtype} {array.shape}; {dtype} {shape} is needed for q_nope {floating} {q_nope.shape}, "
                f"key_up {key_up.shape} and {'pages of ' if pages else ''}selected keys"
            )
    if query_chunk < 1 or 0 in q_nope.shape or 0 in latent.shape or 0 in selected.index.shape:
        raise ValueError(
            f"query_chunk is {query_chunk}, q_nope {q_nope.shape}, latent {latent.shape}, selected.index {selected.index.shape}; "
            "all of them must be positive"
        )
