"""Which implementation of dense attention runs. What all families have in common stands in `pallas_kernels.choose`."""

import jax

from pallas_kernels.case import Implementation
from pallas_kernels.choose import Kernels
from pallas_kernels.choose import choose as choose_of

FAMILY = "attention"


def choose(q_nope: jax.Array, q_rope: jax.Array, value: jax.Array, name: Implementation | None, interpret: bool) -> Kernels:
    """The implementation of this name; without one, the platform's kernels where the arrays fit them and XLA where they do not.

    Raises:
      ValueError: the name is unknown, or its kernels cannot run here or cannot take these arrays.
    """

    def limit(name: str) -> str | None:
        return f"dense attention has no kernels for {name.upper()}"

    return choose_of(FAMILY, name, interpret, None, limit=limit)
