"""What a user calls: one signature for every platform, differentiable, and bad input refused."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.attention.choose import choose
from pallas_kernels.attention.spec import Attended
from pallas_kernels.case import Implementation
from pallas_kernels.choose import Kernels

Array = jax.Array


def dense_attention(
    q_nope: Array,
    q_rope: Array,
    k_nope: Array,
    k_rope: Array,
    value: Array,
    first: Array,
    *,
    scale: float,
    query_block: int = 512,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> Attended:
    """Softmax attention of every query i to the keys first[i] <= j <= i: MLA in its multi-head form (arXiv 2405.04434, Eq. 17-18).

    Logits are (q_nope . k_nope + q_rope . k_rope) * scale in float32 or wider, the rotated key being shared by all heads. Every position
    sees itself, so no row is empty. Kept for the backward pass are the arguments, `out` and `log_total`.

    Args:
      q_nope: [B, H, S, D], bfloat16 or float32 (in XLA any float type).
      q_rope: [B, H, S, R].
      k_nope: [B, H, S, D].
      k_rope: [B, S, R].
      value: [B, H, S, V].
      first: [B, S] int32, 0 <= first[i] <= i and never falling: where the query's document begins, see `visible.causal_span`.
      scale: factor on the logits.
      query_block: queries whose logits exist at a time, in XLA alone.
      implementation: "tpu" (Pallas Mosaic TPU), "gpu" (Pallas Mosaic GPU, Hopper), "xla" (any platform and size), or None for what the
        platform has.
      interpret: runs a kernel step by step on any platform, for tests.

    Returns:
      The attended values, whose gradient reaches the five float arguments, and a query's log_total and top, which have none.

    Raises:
      ValueError: a shape, a type or the platform does not fit; the message says what would.
    """
    _check(q_nope, q_rope, k_nope, k_rope, value, first)
    if query_block < 1:
        raise ValueError(f"query_block is {query_block}; at least one query is needed")
    kernels = choose(q_nope, q_rope, value, implementation, interpret)
    return _dense_attention(scale, query_block, kernels, q_nope, q_rope, k_nope, k_rope, value, first)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _dense_attention(scale: float, query_block: int, kernels: Kernels, *arrays: Array) -> Attended:
    return kernels.dense_attention(*arrays, scale, query_block)


def _forward(scale: float, query_block: int, kernels: Kernels, *arrays: Array) -> tuple[Attended, tuple[Array, ...]]:
    attended = kernels.dense_attention(*arrays, scale, query_block)
    attended = attended._replace(out=checkpoint_name(attended.out, "attention"), log_total=checkpoint_name(attended.log_total, "attention"))
    return attended, (*arrays, attended.out, attended.log_total)


def _backward(scale: float, query_block: int, kernels: Kernels, kept: tuple[Array, ...], cotangents: Attended) -> tuple[Any, ...]:
    first = kept[5]
    no_gradient = np.zeros(first.shape, jax.dtypes.float0)
    return *kernels.dense_attention_backward(*kept, cotangents.out, scale, query_block), no_gradient


_dense_attention.defvjp(_forward, _backward)


def _check(q_nope: Array, q_rope: Array, k_nope: Array, k_rope: Array, value: Array, first: Array) -> None:
    if q_nope.ndim != 4 or q_rope.ndim != 4 or value.ndim != 4:
        raise ValueError(
            f"q_nope, q_rope and value have shapes {q_nope.shape}, {q_rope.shape} and {value.shape}; [B, H, S, D], [B, H, S, R] and "
            f"[B, H, S, V] are needed"
        )
    batch, heads, length, width = q_nope.shape
    if not jnp.issubdtype(q_nope.dtype, jnp.floating):
        raise ValueError(f"q_nope has type {q_nope.dtype}; bfloat16 or float32 is needed")
    if 0 in q_nope.shape or 0 in q_rope.shape or 0 in value.shape:
        raise ValueError(f"q_nope {q_nope.shape}, q_rope {q_rope.shape} and value {value.shape} must not be empty")
    wanted: dict[str, tuple[Array, tuple[int, ...], Any]] = {
        "q_rope": (q_rope, (batch, heads, length, q_rope.shape[3]), q_nope.dtype),
        "k_nope": (k_nope, (batch, heads, length, width), q_nope.dtype),
        "k_rope": (k_rope, (batch, length, q_rope.shape[3]), q_nope.dtype),
        "value": (value, (batch, heads, length, value.shape[3]), q_nope.dtype),
        "first": (first, (batch, length), jnp.dtype(jnp.int32)),
    }
    for name, (array, shape, dtype) in wanted.items():
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(f"{name} is {array.dtype} {array.shape}; {dtype} {shape} is needed for q_nope {q_nope.dtype} {q_nope.shape}")
