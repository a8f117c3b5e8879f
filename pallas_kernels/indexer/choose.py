"""Which implementation of the indexer runs. What all families have in common stands in `pallas_kernels.choose`."""

import importlib

import jax
import jax.numpy as jnp

from pallas_kernels.case import Implementation
from pallas_kernels.choose import LANES, Kernels
from pallas_kernels.choose import choose as choose_of

FAMILY = "indexer"
FEWEST_QUERIES = 16  # fewer leave most of a tile of 64 empty


def choose(q: jax.Array, name: Implementation | None, interpret: bool) -> Kernels:
    """The implementation of this name; without one, the platform's kernels where the arrays fit them and XLA where they do not.

    Raises:
      ValueError: the name is unknown, or its kernels cannot run here or cannot take these arrays.
    """

    def limit(name: str) -> str | None:
        return importlib.import_module(f"pallas_kernels.{FAMILY}.gpu").misfit(q) if name == "gpu" else None

    return choose_of(FAMILY, name, interpret, _misfit(q), limit=limit)


def _misfit(q: jax.Array) -> str | None:
    """What about queries q [B, S, J, I] the kernels cannot take."""
    if q.dtype != jnp.bfloat16:
        return f"q is {q.dtype}; the kernels take bfloat16"
    if q.shape[3] % LANES:
        return f"I is {q.shape[3]}; the kernels need a multiple of {LANES}"
    if q.shape[1] < FEWEST_QUERIES:
        return f"there are {q.shape[1]} queries; the kernels need {FEWEST_QUERIES}"
    return None
