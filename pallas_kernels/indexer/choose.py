"""Which implementation of the indexer runs. What all families have in common stands in `pallas_kernels.choose`."""

import jax

from pallas_kernels.case import Implementation
from pallas_kernels.choose import Kernels
from pallas_kernels.choose import choose as choose_of

FAMILY = "indexer"


def choose(q: jax.Array, k: jax.Array, name: Implementation | None, interpret: bool) -> Kernels:
    """The implementation of this name; without one, the platform's kernels where the arrays fit them and XLA where they do not.

    Raises:
      ValueError: the name is unknown, or its kernels cannot run here or cannot take these arrays.
    """
    return choose_of(FAMILY, name, interpret, None, limit=lambda name: f"there are no {name.upper()} kernels of the indexer")
