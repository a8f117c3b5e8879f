"""Engram's gate: what was looked up is added to every residual stream, weighed by how well stream and key agree (arXiv 2601.07372).

spec         constants, and the arguments of the short convolution
reference    the specification in plain jnp
xla          the gate in plain XLA, for any shape and platform
choose       which implementation runs
api          what a user calls
"""

from pallas_kernels.engram_gate.api import gate_add, gate_conv_add
from pallas_kernels.engram_gate.spec import DILATION, HALO, TAPS, ShortConv

__all__ = ["DILATION", "HALO", "TAPS", "ShortConv", "gate_add", "gate_conv_add"]
