"""Which implementation of dense attention runs. What all families have in common stands in `pallas_kernels.choose`."""

import importlib

import jax

from pallas_kernels.case import Implementation
from pallas_kernels.choose import LANES, Kernels, misfit_of
from pallas_kernels.choose import choose as choose_of

FAMILY = "attention"


def choose(q_nope: jax.Array, q_rope: jax.Array, value: jax.Array, name: Implementation | None, interpret: bool) -> Kernels:
    """The implementation of this name; without one, the platform's kernels where the arrays fit them and XLA where they do not.

    Raises:
      ValueError: the name is unknown, or its kernels cannot run here or cannot take these arrays.
    """

    def limit(name: str) -> str | None:
        if name == "gpu":
            return importlib.import_module(f"pallas_kernels.{FAMILY}.gpu").misfit(q_nope, q_rope, value)
        width, rope, out_width = q_nope.shape[3], q_rope.shape[3], value.shape[3]
        if width % LANES or out_width % LANES or rope % (LANES // 2):
            return f"D, R and V are {width}, {rope} and {out_width}; the kernels need multiples of {LANES}, {LANES // 2} and {LANES}"
        return None

    return choose_of(FAMILY, name, interpret, misfit_of(q_nope), limit=limit)
