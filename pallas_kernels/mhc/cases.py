"""Real shapes of the seam, and the bytes that it must move at each: for tests, benchmarks and the static cost engine.

Widths are those of arXiv 2512.24880's 3B and 27B models (1280 and 2560) and of DeepSeek-V4-Flash and V4-Pro (4096 and 7168); n = 4,
bfloat16. Coefficients, weights and what is saved for the backward pass are left out of the floors: 1 % of the streams at most.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.case import Case, Implementation
from pallas_kernels.mhc import tokamax
from pallas_kernels.mhc.choose import FAMILY, Kernels
from pallas_kernels.mhc.spec import Mapping, Weights

N = 4
SHAPES = [(8192, 2560), (4096, 2560), (16384, 2560), (32768, 2560), (8192, 1280), (8192, 4096), (8192, 7168)]  # tokens, C
FIRST = SHAPES[0]

RESCUE = "a tile with anything not finite in it is mixed again, token by token"

# Streams of C elements a token, read and written: kernel, direction -> (count, what they are).
FLOORS = {
    ("mhc_post_pre", "forward"): (2 * N + 2, "x, y read; streams between, u written"),
    ("mhc_post_pre", "backward"): (3 * N + 3, "x, y and the gradients of the streams between and of u read; dx, dy written"),
    ("mhc_pre", "forward"): (N + 1, "x read; u written"),
    ("mhc_pre", "backward"): (2 * N + 1, "x and du read; dx written"),
    ("mhc_post", "forward"): (2 * N + 1, "x, y read; streams written"),
    ("mhc_post", "backward"): (3 * N + 2, "x, y and the gradient of the streams read; dx, dy written"),
}


def cases() -> list[Case]:
    """The seam at every shape; its two halves and Sinkhorn alone at the first."""
    seams = [_case(kernel, direction, *shape) for kernel, direction in FLOORS if kernel == "mhc_post_pre" for shape in SHAPES]
    halves = [_case(kernel, direction, *FIRST) for kernel, direction in FLOORS if kernel != "mhc_post_pre"]
    return [*seams, *halves, _sinkhorn("forward"), _sinkhorn("backward")]


def _case(kernel: str, direction: Any, tokens: int, width: int) -> Case:
    count, what = FLOORS[kernel, direction]
    return Case(
        name=f"t{tokens}_n{N}_c{width}",
        kernel=kernel,
        direction=direction,
        build=partial(_build, kernel, direction, tokens, width),
        floor_bytes=count * width * 2 * tokens,
        floor_note=f"{what}: {count} C elements of 2 bytes a token",
        rare=RESCUE if direction == "forward" and kernel != "mhc_pre" else "",
        peers={"tokamax": partial(tokamax.build, kernel, tokens, width)} if direction == "forward" else {},
    )


def _build(
    kernel: str, direction: str, tokens: int, width: int, implementation: Implementation
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    mapping, kernels = Mapping(N), Kernels(FAMILY, implementation, False)
    rows = mapping.rows
    x, y = (jax.ShapeDtypeStruct((tokens, c), jnp.bfloat16) for c in (N * width, width))
    h, saved = (jax.ShapeDtypeStruct((k, tokens), jnp.float32) for k in (rows, rows + 1))
    weights = jax.eval_shape(lambda: Weights(jnp.zeros((rows, N * width)), jnp.zeros(3), jnp.zeros(rows)))
    table: dict[tuple[str, str], tuple[Callable[..., Any], tuple[Any, ...]]] = {
        ("mhc_post_pre", "forward"): (lambda *a: kernels.post_pre(*a, mapping), (x, y, h, weights)),
        ("mhc_post_pre", "backward"): (
            lambda x, y, h, weights, *rest: kernels.post_pre_backward(x, y, h, weights, mapping, *rest),
            (x, y, h, weights, saved, x, y, h),
        ),
        ("mhc_pre", "forward"): (lambda *a: kernels.pre(*a, mapping), (x, weights)),
        ("mhc_pre", "backward"): (
            lambda x, weights, *rest: kernels.pre_backward(x, weights, mapping, None, *rest),
            (x, weights, saved, y, h),
        ),
        ("mhc_post", "forward"): (lambda *a: kernels.post(*a, mapping), (x, y, h)),
        ("mhc_post", "backward"): (lambda x, y, h, d: kernels.post_backward(x, y, h, mapping, d), (x, y, h, x)),
    }
    return table[kernel, direction]


def _sinkhorn(direction: Any) -> Case:
    tokens = FIRST[0]
    count = 2 if direction == "forward" else 3

    def build(implementation: Implementation) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        kernels, logits = Kernels(FAMILY, implementation, False), jax.ShapeDtypeStruct((N, N, tokens), jnp.float32)
        if direction == "forward":
            return lambda z: kernels.sinkhorn(z, 20, 0.0), (logits,)
        return lambda z, d: kernels.sinkhorn_backward(z, d, 20, 0.0), (logits, logits)

    what = "logits read, matrices written" if direction == "forward" else "logits and gradients read, gradients written"
    return Case(f"t{tokens}_n{N}", "sinkhorn", direction, build, count * N * N * 4 * tokens, f"{what}: {count} n n floats a token")
