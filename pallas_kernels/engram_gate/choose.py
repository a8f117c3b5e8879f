"""Which implementation of the gate runs. What all families have in common stands in `pallas_kernels.choose`."""

import jax

from pallas_kernels.case import Implementation
from pallas_kernels.choose import SHARED_MEMORY, Kernels, misfit_of
from pallas_kernels.choose import choose as choose_of

FAMILY = "engram_gate"
MOST_WIDTH = 256 * 128  # elements of one copy on GPU


def choose(streams: jax.Array, gain: jax.Array, name: Implementation | None, interpret: bool, *, conv: bool) -> Kernels:
    """The implementation of this name; without one, the platform's kernels where the arrays fit them and XLA where they do not.

    Raises:
      ValueError: the name is unknown, or its kernels cannot run here or cannot take these arrays.
    """
    n, width = gain.shape

    def limit(name: str) -> str | None:
        if name != "gpu":
            return None
        return "the GPU kernels have no convolution" if conv else _too_large(n, width, streams.dtype.itemsize)

    return choose_of(FAMILY, name, interpret, misfit_of(streams, width), limit=limit)


def shared_memory(n: int, width: int, size: int, stages: int) -> int:
    """Bytes of the backward kernel on GPU, which needs more than the forward one: gains, gradients, and tokens under way."""
    return n * width * 4 + (2 * n + 1) * width * size + stages * (3 * n + 1) * width * size


def _too_large(n: int, width: int, size: int) -> str | None:
    needed = shared_memory(n, width, size, stages=1)
    if needed <= SHARED_MEMORY and width <= MOST_WIDTH:
        return None
    return (
        f"a token of {n} streams of width {width} needs {needed // 1024} KiB of shared memory, of which a kernel may use "
        f"{SHARED_MEMORY // 1024} KiB"
    )
