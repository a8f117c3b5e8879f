"""Tile sizes of the backward kernels, by chip. What is done with a tile stands in backward_streams."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mhc.spec import Mapping

LANES = 128
MIB = 1 << 20
LEAST = 64  # tokens of a tile


@dataclass(frozen=True)
class Tiles:
    """Sizes for one call; `gram` divides `tokens`, `lanes` divides C."""

    tokens: int  # tokens of a grid step: 64, 128 or 256
    cores: int  # cores that share the tokens
    dot_group: int  # tokens of a step of the loop that makes dot products
    group: int  # tokens that the vector unit mixes at a time
    lanes: int  # lanes that it mixes at a time, and of a product of matrices
    parts: int  # such blocks of lanes that are scheduled together
    gram: int  # tokens of a Gram block
    narrow: int  # lanes of a coefficient in bfloat16, with which x' is mixed where that is faster; else 0
    vmem: int  # bytes that the kernel may use


def tiles(mapping: Mapping, width: int, tokens: int, dtype: jnp.dtype) -> Tiles:
    """Sizes for streams of `width` lanes on the chip that is traced for; without a TPU (interpret mode), those of a v5p.

    Raises ValueError where not even 64 tokens fit in VMEM.
    """
    if jax.sharding.get_abstract_mesh().abstract_device or pltpu.is_tpu_device():
        info = pltpu.get_tpu_info()
        generation, vmem, cores = info.generation, info.vmem_capacity_bytes, info.num_cores
    else:
        generation, vmem, cores = 5, 64 * MIB, 2
    narrow = {6: 256, 7: 128}.get(generation, 0) if dtype == jnp.bfloat16 else 0
    lanes = 256 if width % 256 == 0 else LANES
    parts = 2 if width % (2 * lanes) == 0 else 1
    limit = vmem - vmem // 16
    tile = 2 * LANES if tokens > LANES else LANES
    while _bytes(mapping, width, tile, dtype, parts * lanes, narrow) > limit:
        tile //= 2
        if tile < LEAST:
            raise ValueError(
                f"{LEAST} tokens of {mapping.n} streams of width {width} need more than the {limit / MIB:.0f} MiB of VMEM "
                "that a kernel may use: "
                "use fewer streams, a smaller width, or the XLA implementation"
            )
    return Tiles(
        tokens=tile,
        cores=cores if -(-tokens // tile) >= cores else 1,
        dot_group=16 if generation > 6 else 8,
        group=16 if generation > 6 else 8,  # rows of a bfloat16 register, as the chip lays it out in VMEM
        lanes=lanes,
        parts=parts,
        gram=16,
        narrow=min(narrow, lanes),
        vmem=limit,
    )


def _bytes(mapping: Mapping, width: int, tile: int, dtype: jnp.dtype, lanes: int, narrow: int) -> int:
    """VMEM for a tile of both parts of a seam. Blocks that move count twice, because they are double-buffered."""
    n, rows, size = mapping.n, mapping.rows, jnp.dtype(dtype).itemsize
    blocks = 2 * tile * width * (3 * n + 3) * size
    small = 2 * tile * 4 * (5 * rows + 2 * n)
    coefficients = (rows + 1) * tile * (4 * LANES + size * narrow)
    between = tile * n * lanes * (4 + 2 * size)
    sums = tile * (n + 1) * LANES * 4 + tile * n * -(-(n + 1) * 16 // LANES) * LANES * 4
    weights = n * width * ((3 * rows + 8) * 2 + 2 * rows * 4)
    return blocks + small + coefficients + between + sums + weights + 2 * MIB
