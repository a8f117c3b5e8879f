"""The seam on TPU (Pallas, Mosaic).

forward      post, pre and both at one seam; its stages are in streams
backward     their gradients; its stages are in backward_scalars and backward_streams, and backward_gates walks Sinkhorn's steps back
sinkhorn     Sinkhorn's iteration alone, forward and backward
tiles_backward sizes of the backward pass, by chip; those of the forward pass follow from pallas_kernels.tpu.tiles
"""

import jax

from pallas_kernels.mhc.spec import Mapping
from pallas_kernels.mhc.tpu import forward, tiles_backward
from pallas_kernels.mhc.tpu.backward import post_backward as post_backward
from pallas_kernels.mhc.tpu.backward import post_pre_backward as post_pre_backward
from pallas_kernels.mhc.tpu.backward import pre_backward as pre_backward
from pallas_kernels.mhc.tpu.forward import post as post
from pallas_kernels.mhc.tpu.forward import post_pre as post_pre
from pallas_kernels.mhc.tpu.forward import pre as pre
from pallas_kernels.mhc.tpu.sinkhorn import sinkhorn as sinkhorn
from pallas_kernels.mhc.tpu.sinkhorn import sinkhorn_backward as sinkhorn_backward
from pallas_kernels.tpu import tiles


def misfit(x: jax.Array, mapping: Mapping, flat: bool) -> str | None:
    """What keeps the kernels from taking streams `x` [T, n*C], forward or backward: VMEM is too small. Matrices alone always fit."""
    if not flat:
        return None
    try:
        forward.shape_for(mapping, x, mixes=True, reads=True, chip=tiles.chip(), small=False)
        tiles_backward.tiles(mapping, x.shape[1] // mapping.n, x.shape[0], x.dtype)
    except ValueError as error:
        return str(error)
    return None
