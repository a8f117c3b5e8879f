"""Real shapes of dense attention, and what it must move and multiply at each: for tests, benchmarks and the static cost engine.

Widths are those of DeepSeek-V3 (128 and 64 of queries and keys, 128 of values), bfloat16, one document. Two of its 128 heads: the time is
proportional to their number (two, so that a device of two cores is busy), and the model runs every block.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention import pytorch
from pallas_kernels.attention.choose import FAMILY
from pallas_kernels.case import Case, Implementation
from pallas_kernels.choose import Kernels

HEADS, WIDTH, ROPE, VALUE = 2, 128, 64, 128
LENGTHS = [4096, 8192, 32768]
FIRST = LENGTHS[0]
SCALE = (WIDTH + ROPE) ** -0.5

# Elements of 2 bytes that a head has for every token, and FLOPs of a pair of query and key: direction -> (elements, FLOPs, what they are).
FLOORS = {
    "forward": (
        2 * WIDTH + ROPE + 2 * VALUE,
        2 * (WIDTH + ROPE + VALUE),
        "queries, keys and values read, out written; logits and their sum",
    ),
    "backward": (
        2 * (2 * WIDTH + ROPE + VALUE) + 2 * VALUE,
        2 * (3 * (WIDTH + ROPE) + 2 * VALUE),
        "queries, keys, values, out and its gradient read, three gradients written; logits again and four products of gradients",
    ),
}


def cases() -> list[Case]:
    """Both directions at every length."""
    return [_case(direction, length) for direction in FLOORS for length in LENGTHS]


def _case(direction: Any, length: int) -> Case:
    elements, flops, what = FLOORS[direction]
    return Case(
        name=f"s{length}_h{HEADS}_d{WIDTH}_r{ROPE}_v{VALUE}",
        kernel="dense_attention",
        direction=direction,
        build=partial(_build, direction, length),
        floor_bytes=2 * elements * HEADS * length,
        floor_note=f"{what}: {elements} elements of 2 bytes a token, {flops} FLOPs a pair under the causal mask, for every head",
        floor_flops=flops * HEADS * (length * (length + 1) // 2),
        peers={"tokamax": partial(_tokamax, direction, length)},
        pytorch=lambda: pytorch.build(direction, HEADS, length, WIDTH + ROPE, VALUE, SCALE),
    )


def _tokamax(direction: str, length: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    from pallas_kernels.attention import tokamax

    return tokamax.build(direction, HEADS, length, WIDTH + ROPE, VALUE)


def _build(direction: str, length: int, implementation: Implementation) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    kernels = Kernels(FAMILY, implementation, False)
    query_block = max(512, length // 16)  # in XLA: more than sixteen blocks take minutes to compile

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, *shape), dtype)

    q, r, out = (array(HEADS, length, width) for width in (WIDTH, ROPE, VALUE))
    given = (q, r, q, array(length, ROPE), out, array(length, dtype=jnp.int32))
    if direction == "forward":
        return lambda *args: kernels.dense_attention(*args, SCALE, query_block), given
    log_total = array(HEADS, length, dtype=jnp.float32)
    return lambda *args: kernels.dense_attention_backward(*args, SCALE, query_block), (*given, out, log_total, out)
