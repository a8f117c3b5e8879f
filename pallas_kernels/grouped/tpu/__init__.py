"""Grouped products on TPU (Pallas, Mosaic).

visits     which tiles of rows meet which groups, as the grids walk over them
products   rows times matrices, and with transposed matrices: forward, and the gradient of rows
outer      rows times rows: the gradient of matrices
"""

from pallas_kernels.grouped.tpu.outer import grouped_outer as grouped_outer
from pallas_kernels.grouped.tpu.products import grouped_matmul as grouped_matmul
