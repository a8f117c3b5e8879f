"""The TPU kernels compile for real chips: pages and scores on one chip, every case on every chip as slow tests."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.indexer import select_pages
from pallas_kernels.indexer.cases import FIRST, TOKENS, cases
from pallas_kernels.static_cost import compile_for
from pallas_kernels.visible import Span

CHIPS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
FIRST_CHIP = "v6e:2x2"


def _is_fast(case, chip: str) -> bool:
    return chip == FIRST_CHIP and case.kernel == "select_pages" and f"t{FIRST}" in case.name


MATRIX = [
    pytest.param(case, chip, id=f"{case.label}-{chip}", marks=() if _is_fast(case, chip) else pytest.mark.slow)
    for case in cases()
    for chip in CHIPS
    if f"t{TOKENS[1]}" not in case.name
]


@pytest.mark.parametrize(("case", "chip"), MATRIX)
def test_the_case_compiles(case, chip):
    fn, args = case.build("tpu")
    assert "tpu_custom_call" in (compile_for(chip, fn, args).as_text() or "")


@pytest.mark.slow
def test_what_the_platform_has_is_chosen_and_takes_ragged_sizes():
    array = jax.ShapeDtypeStruct
    span = Span(*(array((2, 700), jnp.int32),) * 2)
    args = (array((2, 700, 12, 128), jnp.bfloat16), array((2, 900, 128), jnp.bfloat16), array((2, 700, 12), jnp.float32), span)
    text = compile_for(FIRST_CHIP, lambda *args: select_pages(*args, 4), args).as_text() or ""
    assert "tpu_custom_call" in text
