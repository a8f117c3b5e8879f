"""The gate without convolution on Hopper (Pallas, Mosaic GPU). Held to float64 and timed on an H200.

forward      and backward: a program walks over tokens, each of which is read once
rows         what they share: layout, who takes which token, what shared memory has room for
"""

import jax

from pallas_kernels.engram_gate.gpu import rows
from pallas_kernels.engram_gate.gpu.backward import gate_add_backward as gate_add_backward
from pallas_kernels.engram_gate.gpu.forward import gate_add as gate_add


def misfit(streams: jax.Array, n: int, conv: bool) -> str | None:
    """What keeps the kernels from taking these streams [T, n*C], forward or backward."""
    if conv:
        return "the GPU kernels have no convolution"
    return rows.too_large(n, streams.shape[1] // n, streams.dtype.itemsize)
