"""Keeps the memory of one training step for the next, on a CPU.

XLA:CPU asks malloc for all temporaries of a step at once and gives them back after it. glibc serves so large a block by mmap, so the kernel
clears every page again in every step: with the layers of the `laptop` config that was a quarter to two fifths of the processor time.
"""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # of mallopt(3)


def keep_freed_memory() -> None:
    """Tells glibc to serve large blocks from its heap and to keep what is freed. Nothing happens with another C library."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_ARENA_MAX, 1)  # other arenas cannot hold large blocks
