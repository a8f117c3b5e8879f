"""Which implementation of sparse attention runs. What all families have in common stands in `pallas_kernels.choose`."""

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
    misfit = "there are no kernels yet"
    return choose_of(FAMILY, name, interpret, misfit)
