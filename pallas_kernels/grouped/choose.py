"""Which implementation of grouped products runs. What all families have in common stands in `pallas_kernels.choose`."""

import importlib

import jax

from pallas_kernels.case import Implementation
from pallas_kernels.choose import LANES, Kernels, misfit_of
from pallas_kernels.choose import choose as choose_of

FAMILY = "grouped"


def choose(x: jax.Array, w: jax.Array, name: Implementation | None, interpret: bool) -> Kernels:
    """The implementation of this name; without one, the platform's kernels where the arrays fit them and XLA where they do not.

    Raises:
      ValueError: the name is unknown, or its kernels cannot run here or cannot take these arrays.
    """

    def limit(name: str) -> str | None:
        if name == "gpu":
            return importlib.import_module(f"pallas_kernels.{FAMILY}.gpu").misfit(x, w)
        if any(size % LANES for size in (*x.shape, *w.shape[1:])):
            return f"R, I and O are {x.shape[0]}, {w.shape[1]} and {w.shape[2]}; the kernels need multiples of {LANES}"
        return None

    return choose_of(FAMILY, name, interpret, misfit_of(x), limit=limit)
