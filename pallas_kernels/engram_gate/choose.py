"""Which implementation of the gate runs. What all families have in common stands in `pallas_kernels.choose`."""

import importlib

import jax

from pallas_kernels.case import Implementation
from pallas_kernels.choose import Kernels, misfit_of
from pallas_kernels.choose import choose as choose_of

FAMILY = "engram_gate"


def choose(streams: jax.Array, gain: jax.Array, name: Implementation | None, interpret: bool, *, conv: bool) -> Kernels:
    """The implementation of this name; without one, the platform's kernels where the arrays fit them and XLA where they do not.

    Raises:
      ValueError: the name is unknown, or its kernels cannot run here or cannot take these arrays.
    """
    n, width = gain.shape

    def limit(name: str) -> str | None:
        return importlib.import_module(f"pallas_kernels.{FAMILY}.{name}").misfit(streams, n, conv)

    return choose_of(FAMILY, name, interpret, misfit_of(streams, width), limit=limit)
