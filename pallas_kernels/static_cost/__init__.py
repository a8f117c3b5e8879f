"""The cost of a program on a chip that is not there, read off the real compiler's output. Modelled, never measured.

`cost` compiles in a new process and models; `compile_for` and `lower_for` only check that a program compiles or lowers. See
docs/static_cost.md.
"""

from pallas_kernels.static_cost.child import cost, last_words, listings
from pallas_kernels.static_cost.chips import CHIPS, Chip, chip_of
from pallas_kernels.static_cost.compile import check_libtpu, compile_for, lower_for, target_devices
from pallas_kernels.static_cost.hlo import parse_module
from pallas_kernels.static_cost.model import Cost, OperationCost

__all__ = [
    "CHIPS",
    "Chip",
    "Cost",
    "OperationCost",
    "check_libtpu",
    "chip_of",
    "compile_for",
    "cost",
    "last_words",
    "listings",
    "lower_for",
    "parse_module",
    "target_devices",
]
