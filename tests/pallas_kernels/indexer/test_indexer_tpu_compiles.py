"""The TPU kernels compile for real chips: `compile_cases` says which case for which chip in which suite."""

import jax
import jax.numpy as jnp
import pytest
from compile_cases import FIRST_CHIP, check_compiles, matrix

from pallas_kernels.indexer import select_pages
from pallas_kernels.indexer.cases import FIRST, cases
from pallas_kernels.static_cost import compile_for
from pallas_kernels.visible import Span


def first(case):
    return f"t{FIRST}" in case.name


@pytest.mark.parametrize(("case", "chip"), matrix(cases(), first, lambda case: case.kernel == "select_pages"))
def test_the_case_compiles(case, chip):
    check_compiles(case, chip)


@pytest.mark.slow
def test_what_the_platform_has_is_chosen_and_takes_ragged_sizes():
    array = jax.ShapeDtypeStruct
    span = Span(*(array((2, 700), jnp.int32),) * 2)
    args = (array((2, 700, 12, 128), jnp.bfloat16), array((2, 900, 128), jnp.bfloat16), array((2, 700, 12), jnp.float32), span)
    text = compile_for(FIRST_CHIP, lambda *args: select_pages(*args, 4), args).as_text() or ""
    assert "tpu_custom_call" in text
