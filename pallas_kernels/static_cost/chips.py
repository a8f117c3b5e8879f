"""The TPU generations the model knows, with the source of each figure. Nothing here is fitted."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """What one JAX device of a TPU generation is. On v5p one device is a chip of two cores, on tpu7x it is one of a chip's two cores.

    HBM bandwidth, VMEM and core counts are those of JAX's own registry (`pltpu.get_tpu_info()`); a test compares them.

    The clock is public for v5e (1.5 GHz) and v5p (1.75 GHz). For v6e and tpu7x it is derived: the published peak bfloat16 rate divided by
    what the matrix units do in a cycle. Both have two 256x256 units a core. 918 TFLOP/s / (2 units 256^2 2 FLOP) is 3.5 GHz, and such units
    start a row twice a cycle, so the core runs at 1.75 GHz; 2307 TFLOP/s over two cores gives 2.2 GHz in the same way.
    """

    name: str  # as topology names begin: "v6e" of "v6e:2x2"
    device_kind: str  # what JAX calls the device
    clock_ghz: float
    hbm_bytes_per_second: float  # of one device: all its cores together
    cores: int  # TensorCores of one device, over which a grid axis declared "parallel" is split
    vmem_bytes: int  # of one core
    branch_delay: int  # bundles after a branch that still run: in a listing, from the branch to the end of its region
    flops_per_cycle: int  # of one core's matrix units, bfloat16

    @property
    def flops_per_second(self) -> float:
        """Peak of one device's matrix units, bfloat16."""
        return self.flops_per_cycle * self.cores * self.clock_ghz * 1e9


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "TPU v5 lite", 1.5, 0.82e12, 1, 128 << 20, 4, 4 * 128 * 128 * 2),
        Chip("v5p", "TPU v5", 1.75, 2.46e12, 2, 64 << 20, 4, 4 * 128 * 128 * 2),
        Chip("v6e", "TPU v6 lite", 1.75, 1.64e12, 1, 128 << 20, 4, 2 * 256 * 256 * 2 * 2),
        Chip("tpu7x", "TPU7x", 2.2, 3.7e12, 1, 64 << 20, 6, 2 * 256 * 256 * 2 * 2),
    )
}


def chip_of(topology: str) -> Chip:
    """The chip of a topology name such as "v6e:2x2"; ValueError if the model does not know it."""
    name = topology.partition(":")[0]
    if name not in CHIPS or ":" not in topology:
        raise ValueError(f"there is no topology {topology!r} here; use one such as v5e:2x2, v5p:2x2x1, v6e:2x2 or tpu7x:2x2x1")
    return CHIPS[name]
