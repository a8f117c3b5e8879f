"""Which cases of a kernel family are compiled for which TPU, in which suite; nothing is run."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from pallas_kernels.case import Case
from pallas_kernels.static_cost import compile_for

CHIPS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
FIRST_CHIP = "v6e:2x2"
RARE_CHIP = "v5e:2x2"  # no kernel is tuned for it


def matrix(cases: Sequence[Case], first: Callable[[Case], bool], fast: Callable[[Case], bool] = lambda case: True) -> list[Any]:
    """Every case with every chip: the `first` shape on every chip but one with the slow tests, on one chip with the fast ones where it
    also is `fast`, all others when the marker `matrix` is asked for."""

    def marks(case: Case, chip: str) -> Any:
        if not first(case) or chip == RARE_CHIP:
            return pytest.mark.matrix
        return () if chip == FIRST_CHIP and fast(case) else pytest.mark.slow

    return [pytest.param(case, chip, id=f"{case.label}-{chip}", marks=marks(case, chip)) for case in cases for chip in CHIPS]


def check_compiles(case: Case, chip: str) -> None:
    """The case compiles for the chip, to a program that holds a kernel."""
    fn, args = case.build("tpu")
    assert "tpu_custom_call" in (compile_for(chip, fn, args).as_text() or "")
