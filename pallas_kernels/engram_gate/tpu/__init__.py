"""The gate on TPU (Pallas, Mosaic).

forward            and backward: without convolution, one pass each
conv_forward       and conv_backward: with it, tile after tile, as earlier and later tokens matter
factors            numbers of a token that the backward kernels multiply with
groups             what they share: sizes, groups of tokens, rows and columns
"""

import jax

from pallas_kernels.engram_gate.tpu import backward, conv_backward, conv_forward, forward
from pallas_kernels.engram_gate.tpu.backward import gate_add_backward as gate_add_backward
from pallas_kernels.engram_gate.tpu.conv_backward import gate_conv_add_backward as gate_conv_add_backward
from pallas_kernels.engram_gate.tpu.conv_forward import gate_conv_add as gate_conv_add
from pallas_kernels.engram_gate.tpu.forward import gate_add as gate_add


def misfit(streams: jax.Array, n: int, conv: bool) -> str | None:
    """What keeps the kernels from taking these streams [T, n*C], forward or backward: VMEM is too small."""
    try:
        for kernel in (conv_forward, conv_backward) if conv else (forward, backward):
            kernel.shape_for(streams, n)
    except ValueError as error:
        return str(error)
    return None
