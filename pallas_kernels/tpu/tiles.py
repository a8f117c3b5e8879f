"""Which chip a kernel is traced for, and the tile sizes that follow from it. What is done with a tile stands in the kernels."""

from dataclasses import dataclass

import jax
from jax.experimental.pallas import tpu as pltpu

LANES = 128
MIB = 1 << 20

Interpret = bool | pltpu.InterpretParams  # run on a CPU: plainly, or with a TPU's memories and DMAs imitated


@dataclass(frozen=True)
class Chip:
    """What of a TPU decides tile sizes; all of it for one core."""

    generation: int
    vmem: int  # bytes
    mxu: int  # rows and columns of a matrix unit
    cores: int = 1  # cores of one device, which share a grid


def chip() -> Chip:
    """The chip that is traced for: the abstract mesh's where one is set, else the default device's; without a TPU a v5p."""
    if not (jax.sharding.get_abstract_mesh().abstract_device or pltpu.is_tpu_device()):
        return Chip(generation=5, vmem=64 * MIB, mxu=128, cores=2)
    info = pltpu.get_tpu_info()
    return Chip(info.generation, info.vmem_capacity_bytes, info.mxu_column_size, info.num_cores)


def vmem_limit(chip: Chip) -> int:
    """Bytes of VMEM that a kernel may ask for: a sixteenth is left to the compiler's own use."""
    return chip.vmem - chip.vmem // 16


def token_tile(tokens: int, bytes_per_token: int, fixed_bytes: int, chip: Chip, most: int = 512, least: int = LANES) -> int:
    """Tokens of a tile: `least` times a power of two that VMEM holds and `most` bounds, no more than the tokens need.

    `bytes_per_token` counts what grows with the tile, blocks twice because they are double-buffered; `fixed_bytes` what does not.
    Raises ValueError where not even `least` tokens fit.
    """
    fits = (vmem_limit(chip) - fixed_bytes) // bytes_per_token
    if fits < least:
        raise ValueError(
            f"{least} tokens need {(fixed_bytes + least * bytes_per_token) / MIB:.0f} MiB of VMEM, of which a kernel may use "
            f"{vmem_limit(chip) / MIB:.0f} MiB: use fewer streams, a smaller C, or the XLA implementation"
        )
    tile = least
    while 2 * tile <= min(fits, most) and tile < tokens:
        tile *= 2
    return tile


def divisor(total: int, most: int) -> int:
    """The largest divisor of `total` that is no larger than `most`."""
    return next(d for d in range(min(total, most), 0, -1) if total % d == 0)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple
