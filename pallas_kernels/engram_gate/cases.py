"""Real shapes of the gate, and the bytes that it must move at each: for tests, benchmarks and the static cost engine.

Widths are those of arXiv 2601.07372's 27B model (2560), of DeepSeek-V4.1-Flash (5120), and half the former; n = 4, bfloat16. Gains,
filters, alpha and what is saved for the backward pass are left out of the floors: 1 % of the streams at most.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.case import Case, Implementation
from pallas_kernels.choose import Kernels
from pallas_kernels.engram_gate.choose import FAMILY
from pallas_kernels.engram_gate.spec import TAPS, ShortConv

N = 4
SHAPES = [(8192, 2560), (32768, 2560), (8192, 1280), (8192, 5120)]  # tokens, C
FIRST = SHAPES[0]
NORM_EPS, CONV_EPS = 1e-6, 1e-5

# Streams of C elements a token, read and written: direction -> (count, what they are). The same with and without the convolution.
FLOORS = {
    "forward": (3 * N + 1, "streams, keys and value read; streams written"),
    "backward": (5 * N + 2, "streams, keys, value and the gradient of the streams read; gradients of the first three written"),
}


def cases() -> list[Case]:
    """Both forms at every shape."""
    return [_case(kernel, direction, *shape) for kernel in ("gate_add", "gate_conv_add") for direction in FLOORS for shape in SHAPES]


def _case(kernel: str, direction: Any, tokens: int, width: int) -> Case:
    count, what = FLOORS[direction]
    return Case(
        name=f"t{tokens}_n{N}_c{width}",
        kernel=kernel,
        direction=direction,
        build=partial(_build, kernel, direction, tokens, width),
        floor_bytes=count * width * 2 * tokens,
        floor_note=f"{what}: {count} C elements of 2 bytes a token",
    )


def _build(
    kernel: str, direction: str, tokens: int, width: int, implementation: Implementation
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    kernels = Kernels(FAMILY, implementation, False)

    def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    streams, keys_value = (array(tokens, k * width, dtype=jnp.bfloat16) for k in (N, N + 1))
    gain, alpha = array(N, width), array(N, tokens)
    conv = jax.eval_shape(lambda: ShortConv(jnp.zeros((TAPS, N, width)), jnp.zeros((N, width)), jnp.zeros(tokens, jnp.int32)))
    given, kept = (streams, keys_value, gain), array(3 * N, tokens)
    kept_with_conv = array(3 * N + 1, tokens)
    table: dict[tuple[str, str], tuple[Callable[..., Any], tuple[Any, ...]]] = {
        ("gate_add", "forward"): (lambda *a: kernels.gate_add(*a, NORM_EPS), given),
        ("gate_add", "backward"): (kernels.gate_add_backward, (*given, kept, streams, alpha)),
        ("gate_conv_add", "forward"): (lambda *a: kernels.gate_conv_add(*a, NORM_EPS, CONV_EPS), (*given, conv)),
        ("gate_conv_add", "backward"): (
            lambda streams, keys_value, gain, conv, *rest: kernels.gate_conv_add_backward(streams, keys_value, gain, conv, CONV_EPS, *rest),
            (*given, conv, kept_with_conv, streams, alpha),
        ),
    }
    return table[kernel, direction]
