"""The gate without convolution on Hopper (Pallas, Mosaic GPU). Correct in the interpreter and compiled for H100; not yet run or timed.

forward      and backward: a program walks over tokens, each of which is read once
rows         what they share: layout, who takes which token, what shared memory has room for
"""

from pallas_kernels.engram_gate.gpu.backward import gate_add_backward as gate_add_backward
from pallas_kernels.engram_gate.gpu.forward import gate_add as gate_add
