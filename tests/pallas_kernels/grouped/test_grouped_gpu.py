"""GPU kernels of grouped products, run on a Hopper GPU or interpreted on the CPU, and lowered for Hopper. Nothing here is timed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper import INTERPRET, on_hopper
from test_grouped import ROWS, SIZES, oracle, problem

from pallas_kernels.grouped import grouped_matmul
from pallas_kernels.grouped.gpu.walk import TILE, walk
from pallas_kernels.static_cost import lower_for

BF16 = jnp.bfloat16


def found(x, w, g, sizes, dtype=BF16):
    x, w, g = (jnp.asarray(a, dtype) for a in (x, w, g))
    multiply = lambda x, w: grouped_matmul(x, w, jnp.array(sizes, jnp.int32), implementation="gpu", interpret=INTERPRET)  # noqa: E731

    @jax.jit
    def run(x, w, g):
        out, pull = jax.vjp(multiply, x, w)
        return out, *pull(g)

    return run(x, w, g)


@pytest.mark.parametrize("name", SIZES)
def test_products_and_gradients_are_float64s_rounded_once(name):
    x, w, g = problem(SIZES[name], BF16)
    for ours, exact in zip(found(x, w, g, SIZES[name]), oracle(x, w, g, SIZES[name]), strict=True):
        error = np.abs(np.asarray(ours, np.float64) - exact)
        assert (error <= 2.0**-8 * np.abs(exact) + 1e-4).all(), error.max()
