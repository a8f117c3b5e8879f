"""Which implementation of the seam runs. What all families have in common stands in `pallas_kernels.choose`."""

import importlib

import jax

from pallas_kernels.case import Implementation
from pallas_kernels.choose import Kernels, misfit_of
from pallas_kernels.choose import choose as choose_of
from pallas_kernels.mhc.spec import Mapping

FAMILY = "mhc"


def choose(x: jax.Array, mapping: Mapping, name: Implementation | None, interpret: bool, *, flat: bool = True) -> Kernels:
    """The implementation of this name; without one, the platform's kernels where the array fits them and XLA where it does not.

    Raises:
      ValueError: the name is unknown, or its kernels cannot run here or cannot take this array.
    """

    def limit(name: str) -> str | None:
        return importlib.import_module(f"pallas_kernels.{FAMILY}.{name}").misfit(x, mapping, flat)

    return choose_of(FAMILY, name, interpret, misfit_of(x, x.shape[1] // mapping.n if flat else None), limit=limit)
