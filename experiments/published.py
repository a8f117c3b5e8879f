"""What arXiv 2512.24880 reports at 27B parameters and 262B tokens, for a reader to hold beside measured numbers of another scale."""

from dataclasses import dataclass

SOURCE = "arXiv 2512.24880, 27B parameters, 262B tokens, n = 4, one run each"


@dataclass(frozen=True)
class Published:
    """One number of the paper."""

    quantity: str
    residual: str  # kind that it belongs to
    measure: str  # "loss_gap", "gain" or "overhead": what it is compared with here
    value: str
    status: str  # how the number is known


PUBLISHED = (
    Published("loss gap to `residual` (nats)", "mhc", "loss_gap", "-0.021", "stated in the paper"),
    Published("loss gap to `residual` (nats)", "hc", "loss_gap", "about -0.016", "read off a figure"),
    Published("largest composite gain", "hc", "gain", "about 3000", "stated in the paper"),
    Published("largest composite gain", "mhc", "gain", "about 1.6", "stated in the paper"),
    Published("step-time overhead", "mhc", "overhead", "6.7 %", "stated in the paper, with fused kernels"),
)
