"""Which implementation of sparse attention runs. What all families have in common stands in `pallas_kernels.choose`."""

import importlib

import jax

from pallas_kernels.case import Implementation
from pallas_kernels.choose import Kernels
from pallas_kernels.choose import choose as choose_of

FAMILY = "sparse_attention"


def choose(latent: jax.Array, rank: int, queries: int, heads: int, name: Implementation | None, interpret: bool, *, pages: bool) -> Kernels:
    """The implementation of this name; without one, the platform's kernels where the arrays fit them and XLA where they do not.

    Raises:
      ValueError: the name is unknown, or its kernels cannot run here or cannot take these arrays.
    """

    def limit(name: str) -> str | None:
        if name == "gpu":
            return importlib.import_module(f"pallas_kernels.{FAMILY}.gpu").misfit(latent, rank, heads)
        return f"there are no {name.upper()} kernels yet"

    return choose_of(FAMILY, name, interpret, None, limit=limit)
