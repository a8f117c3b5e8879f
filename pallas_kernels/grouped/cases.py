"""Real shapes of grouped products, for benchmarks on an accelerator: both products of an expert in the models of the mHC paper.

arXiv 2512.24880, Table 5: 3B with 64 experts of 1280 x 896, 27B with 72 of 2560 x 1536; 6 visits a token. The groups are uneven, as routing
without much balance makes them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.case import Case, Implementation
from pallas_kernels.choose import Kernels
from pallas_kernels.grouped.choose import FAMILY

UNSCHEDULED = "how many rows each group has is data, and with it the walk over tiles"


@dataclass(frozen=True)
class Shape:
    """Rows x [R, I] and matrices [E, I, O]."""

    rows: int
    groups: int
    width: int
    out: int


SHAPES = (
    Shape(98304, 64, 1280, 1792),
    Shape(98304, 64, 896, 1280),
    Shape(73728, 72, 2560, 3072),
    Shape(73728, 72, 1536, 2560),
)
KERNELS = (("grouped_matmul", False), ("grouped_matmul", True), ("grouped_outer", False))  # and whether the matrices are transposed


def cases() -> list[Case]:
    """Every shape: the product, its gradient of rows and of matrices."""
    return [_case(shape, kernel, transposed) for shape in SHAPES for kernel, transposed in KERNELS]


def _case(shape: Shape, kernel: str, transposed: bool) -> Case:
    x, w, y = shape.rows * shape.width, shape.groups * shape.width * shape.out, shape.rows * shape.out
    return Case(
        name=f"r{shape.rows}_e{shape.groups}_i{shape.width}_o{shape.out}",
        kernel=kernel,
        direction="backward" if transposed or kernel == "grouped_outer" else "forward",
        build=partial(_build, shape, kernel, transposed),
        floor_bytes=2 * (x + w + y),
        floor_note="two of rows, matrices and results read, the third written; 2 R I O FLOPs",
        floor_flops=2 * shape.rows * shape.width * shape.out,
        values=_uneven,
        unscheduled=UNSCHEDULED,
    )


def _uneven(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """With sizes that add up to all rows and differ by about a third."""
    rng, (*arrays, sizes) = np.random.default_rng(0), args
    groups = sizes.shape[0]
    return *arrays, jnp.asarray(rng.multinomial(arrays[0].shape[0], rng.dirichlet(np.full(groups, 8.0))), jnp.int32)


def _build(shape: Shape, kernel: str, transposed: bool, implementation: Implementation) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    array, of = jax.ShapeDtypeStruct, Kernels(FAMILY, implementation, False)
    x, y = (array((shape.rows, columns), jnp.bfloat16) for columns in (shape.width, shape.out))
    w, sizes = array((shape.groups, shape.width, shape.out), jnp.bfloat16), array((shape.groups,), jnp.int32)
    if kernel == "grouped_outer":
        return of.grouped_outer, (x, y, sizes)
    return partial(of.grouped_matmul, transposed=transposed), (y if transposed else x, w, sizes)
