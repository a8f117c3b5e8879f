"""Grouped products on Hopper (Pallas, Mosaic GPU).

walk       which groups have rows in which tile
pipeline   the two warpgroups that multiply what a third brings
products   rows times matrices, and with transposed matrices: forward, and the gradient of rows
outer      rows times rows: the gradient of matrices
"""

from pallas_kernels.grouped.gpu.outer import grouped_outer as grouped_outer
from pallas_kernels.grouped.gpu.products import grouped_matmul as grouped_matmul
