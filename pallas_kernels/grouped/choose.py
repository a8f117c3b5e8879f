"""Which implementation of grouped products runs. What all families have in common stands in `pallas_kernels.choose`."""

import jax
import jax.numpy as jnp

from pallas_kernels.case import Implementation
from pallas_kernels.choose import LANES, Kernels, misfit_of, target
from pallas_kernels.choose import choose as choose_of

FAMILY = "grouped"
FEW_ROWS = 512


def choose(x: jax.Array, w: jax.Array, name: Implementation | None, interpret: bool) -> Kernels:
    """The implementation of this name; without one, the platform's kernels where the arrays fit them and XLA where they do not.

    Raises:
      ValueError: the name is unknown, or its kernels cannot run here or cannot take these arrays.
    """

    def limit(name: str) -> str | None:
        if name == "gpu" and x.dtype != jnp.bfloat16:
            return f"the arrays are {x.dtype}; the GPU kernels take bfloat16"
        if any(size % LANES for size in w.shape[1:]):
            return f"I and O are {w.shape[1]} and {w.shape[2]}; the kernels need multiples of {LANES}"
        return None

    # On a GPU one program goes through all groups of a tile: with few tiles, as in decoding, most of it would stand idle.
    if name is None and target()[0] == "gpu" and x.shape[0] < FEW_ROWS:
        name = "xla"
    return choose_of(FAMILY, name, interpret, misfit_of(x), limit=limit)
