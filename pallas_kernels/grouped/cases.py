"""Real shapes of grouped products, and what they must move and multiply: for tests, benchmarks and the static cost engine.

The first product of the routed experts of the mHC paper's 27B model (arXiv 2512.24880, Table 5) for 8192 tokens, 6 experts each.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.case import Case, Implementation
from pallas_kernels.choose import Kernels
from pallas_kernels.grouped.choose import FAMILY

ROWS, GROUPS, WIDTH, OUT = 8192 * 6, 72, 2560, 2 * 1536


def cases() -> list[Case]:
    """The product, and its gradients together."""
    name = f"r{ROWS}_e{GROUPS}_i{WIDTH}_o{OUT}"
    rows, matrices = 2 * ROWS * (WIDTH + OUT), 2 * GROUPS * WIDTH * OUT
    flops = 2 * ROWS * WIDTH * OUT
    return [
        Case(
            name=name,
            kernel="grouped_matmul",
            direction="forward",
            build=_forward,
            floor_bytes=rows + matrices,
            floor_note="rows and matrices read, results written, 2 bytes a number; one product",
            floor_flops=flops,
        ),
        Case(
            name=name,
            kernel="grouped_matmul",
            direction="backward",
            build=_backward,
            floor_bytes=rows + 2 * ROWS * WIDTH + 2 * matrices,
            floor_note="rows, gradients and matrices read, both gradients written, 2 bytes a number; two products",
            floor_flops=2 * flops,
        ),
    ]


def _given() -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    array = partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    return array((ROWS, WIDTH)), array((GROUPS, WIDTH, OUT)), jax.ShapeDtypeStruct((GROUPS,), jnp.int32)


def _forward(implementation: Implementation) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return Kernels(FAMILY, implementation, False).grouped_matmul, _given()


def _backward(implementation: Implementation) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    kernels = Kernels(FAMILY, implementation, False)

    def gradients(x: Any, w: Any, sizes: Any, g: Any) -> tuple[Any, Any]:
        return kernels.grouped_matmul(g, w, sizes, transposed=True), kernels.grouped_outer(x, g, sizes)

    return gradients, (*_given(), jax.ShapeDtypeStruct((ROWS, OUT), jnp.bfloat16))
