"""Chips, and what a training run costs on them: hours from FLOPs, tokens and MFU; dollars from a price that you give.

Prices are arguments: they change by the month and by the contract. The one price here is that at which DeepSeek counts its H800.
"""

from dataclasses import dataclass

from pallas_kernels.static_cost.chips import CHIPS

H800_DOLLARS = 2.0  # an hour, as DeepSeek-V3 assumes (arXiv 2412.19437, Table 1)


@dataclass(frozen=True)
class Accelerator:
    """One chip as it is sold. Peaks are those of dense matrix products."""

    name: str
    flops_per_second: float  # bfloat16
    narrow_flops_per_second: float  # in 8 bits: float8, or int8 where there is none; the bfloat16 peak where neither is faster
    hbm_bytes: float
    hbm_bytes_per_second: float


def _tpu(name: str, narrow: float, gigabytes: float, devices: int = 1) -> Accelerator:
    """`devices`: JAX devices of a chip, which is what `pallas_kernels` describes."""
    device = CHIPS[name]
    return Accelerator(name, devices * device.flops_per_second, narrow, gigabytes * 1e9, devices * device.hbm_bytes_per_second)


# TPUs: bfloat16 peaks and bandwidth are those of `pallas_kernels.static_cost` (within 0.3 % of Google's 197, 459, 918 and 2307 TFLOP/s);
# 8-bit peaks and memory from Google's pages of each generation (cloud.google.com/tpu/docs/v5e, v5p, v6e, tpu7x): int8 on v5e, v5p and v6e,
# float8 on tpu7x, which has two JAX devices a chip.
# H100 and H200: NVIDIA's data sheets of the SXM form, without sparsity. H800: the same compute and memory with a slower NVLink, which
# nothing here counts; 989 TFLOP/s is also the peak behind the published MFU (arXiv 2505.09343, Table 4).
ACCELERATORS = {
    chip.name: chip
    for chip in (
        _tpu("v5e", 394e12, 16),
        _tpu("v5p", 918e12, 95),
        _tpu("v6e", 1836e12, 32),
        _tpu("tpu7x", 4614e12, 192, devices=2),
        Accelerator("H100", 989e12, 1979e12, 80e9, 3.35e12),
        Accelerator("H200", 989e12, 1979e12, 141e9, 4.8e12),
        Accelerator("H800", 989e12, 1979e12, 80e9, 3.35e12),
    )
}


@dataclass(frozen=True)
class Bill:
    """What a run takes."""

    flops: float
    chip_hours: float
    dollars: float

    def days(self, chips: int) -> float:
        """On this many chips, none of them ever idle."""
        return self.chip_hours / chips / 24


def training_bill(flops_per_token: float, tokens: float, chip: Accelerator, *, mfu: float, dollars_per_hour: float) -> Bill:
    """The bill of a training run.

    Args:
      flops_per_token: forward and backward, as of `plan.flops.training_flops`; recomputation is not in it.
      tokens: trained on.
      chip: whose bfloat16 peak the MFU is a share of.
      mfu: model FLOPs utilisation, in (0, 1]: which counts the same FLOPs as `flops_per_token`.
      dollars_per_hour: of one chip.

    Raises:
      ValueError: the utilisation is not in (0, 1].
    """
    if not 0 < mfu <= 1:
        raise ValueError(f"an MFU of {mfu} is not in (0, 1]")
    flops = flops_per_token * tokens
    hours = flops / (chip.flops_per_second * mfu) / 3600
    return Bill(flops, hours, hours * dollars_per_hour)


def utilisation(flops_per_token: float, tokens_per_second: float, chip: Accelerator) -> float:
    """MFU of one chip that trains so many tokens a second."""
    return flops_per_token * tokens_per_second / chip.flops_per_second


def matching_price(bill: Bill, dollars: float) -> float:
    """Dollars that an hour of the bill's chip may cost for the run to cost `dollars`."""
    return dollars / bill.chip_hours
