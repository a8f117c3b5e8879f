"""GPU kernels lowered for Hopper without a GPU or its compiler: layouts, wgmma operands and shared memory are checked by JAX."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.mhc import Mapping, Weights, gpu
from pallas_kernels.static_cost import lower_for


def arguments(mapping: Mapping, tokens: int, width: int, dtype):
    """Shapes of x, y, h, weights and saved."""

    def of(*shape, kind=jnp.float32):
        return jax.ShapeDtypeStruct(shape, kind)

    n, rows = mapping.n, mapping.rows
    weights = Weights(of(rows, n * width), of(len(mapping.groups)), of(rows))
    return of(tokens, n * width, kind=dtype), of(tokens, width, kind=dtype), of(rows, tokens), weights, of(rows + 1, tokens)


def lower(chip: str, mapping: Mapping, dtype=jnp.bfloat16, tokens: int = 1000, width: int = 2560) -> int:
    """The seam, both ways, as StableHLO; returns the number of GPU kernels in it."""
    x, y, h, weights, saved = arguments(mapping, tokens, width, dtype)
    forward = lower_for(chip, lambda *a: gpu.post_pre(*a, mapping), (x, y, h, weights))

    def back(x, y, h, weights, saved, *cotangents):
        return gpu.post_pre_backward(x, y, h, weights, mapping, saved, *cotangents)

    backward = lower_for(chip, back, (x, y, h, weights, saved, x, y, h))
    return sum(lowered.as_text().count("@mosaic_gpu") for lowered in (forward, backward))


@pytest.mark.parametrize("chip", ["H100", pytest.param("H200", marks=pytest.mark.slow)])
def test_the_seam_of_a_large_model_is_six_kernels(chip):
    """Stream, gates and read; products with d_u, gates backward and stream backward."""
    assert lower(chip, Mapping(4)) == 6


def test_whose_pre_came_before_is_read_in_the_first_pass():
    assert lower("H100", Mapping(2, reads="previous"), jnp.float32) == 5


@pytest.mark.parametrize(
    ("mapping", "dtype"),
    [
        (Mapping(1), jnp.float32),
        (Mapping(3), jnp.bfloat16),
        (Mapping(8, mixes=False), jnp.bfloat16),
        pytest.param(Mapping(4), jnp.float32, marks=pytest.mark.slow),
        *(pytest.param(Mapping(n), dtype, marks=pytest.mark.slow) for n in (5, 6, 7, 8) for dtype in (jnp.float32, jnp.bfloat16)),
        *(pytest.param(Mapping(n, mixes=False), jnp.float32, marks=pytest.mark.slow) for n in (6, 7, 8)),
    ],
)
def test_shared_memory_holds_any_number_of_streams(mapping, dtype):
    assert lower("H100", mapping, dtype, tokens=65, width=128) >= 6


@pytest.mark.parametrize("chip", ["H100", "B200"])
def test_post_needs_no_wgmma(chip):
    mapping = Mapping(4)
    x, y, h, _, _ = arguments(mapping, 1000, 2560, jnp.bfloat16)
    lowered = lower_for(chip, lambda x, y, h, d: (gpu.post(x, y, h, mapping), gpu.post_backward(x, y, h, mapping, d)), (x, y, h, x))
    assert lowered.as_text().count("@mosaic_gpu") == 2


def test_blackwell_is_refused_where_wgmma_is_needed():
    with pytest.raises(ValueError, match=r'NVIDIA B200 has not; implementation "xla" runs on any GPU'):
        lower("B200", Mapping(4))
