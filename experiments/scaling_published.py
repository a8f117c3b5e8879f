"""Gaps of mHC to the plain residual that others measured at several scales, and published coefficients of the law. Facts with their
sources; nothing is fitted here."""

from dataclasses import dataclass
from functools import cached_property

from mhc_jax.config import override
from mhc_jax.configs import get
from mhc_jax.experiments.scaling_law import Law
from mhc_jax.plan.flops import training_flops

PAPER = "arXiv 2512.24880"
FACTORY = "wdlctc/hyper-connection-factory"
TPU_RUNS = "marcoshernanz/multi-head-mhc"

# arXiv 2404.10102, Table 1, and its bootstrap standard errors, two decimals as printed: 240 points of Figure 4 of arXiv 2203.15556.
BESIROGLU = Law(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)
BESIROGLU_ERRORS = {"E": 0.03, "A": 124.58, "B": 1293.23, "alpha": 0.02, "beta": 0.02}
# arXiv 2203.15556, its approach 3, digits of its TeX source as given in arXiv 2404.10102.
HOFFMANN = Law(E=1.6934, A=406.4, B=410.7, alpha=0.3392, beta=0.2849)


@dataclass(frozen=True)
class PublishedGap:
    """Loss of mHC minus that of the plain residual, n = 4."""

    source: str
    model: str
    gap: float  # nats
    error: float | None  # as published, where there are several seeds
    tokens: float
    parameters: float | None  # for 6 N D; None where `config` is counted instead
    config: str | None  # named config of the same shape
    status: str

    @cached_property
    def flops(self) -> float:
        """Of the plain residual's training: counted where the shape is known, 6 N D elsewhere."""
        if self.config is None:
            assert self.parameters is not None
            return 6 * self.parameters * self.tokens
        plain = override(get(self.config), {"model.residual": "residual"})
        return training_flops(plain, plain.data.seq_len).total * self.tokens


def _paper(config: str, gap: float, tokens: float, status: str) -> PublishedGap:
    return PublishedGap(PAPER, config.upper(), gap, None, tokens, None, config, status)


def _factory(model: str, parameters: float, gap: float, error: float | None = None) -> PublishedGap:
    return PublishedGap(FACTORY, model, gap, error, 20 * parameters, parameters, None, "3 seeds" if error else "one seed")


def _tpu(model: str, parameters: float, gap: float) -> PublishedGap:
    return PublishedGap(TPU_RUNS, model, gap, 0.008, 98e6, parameters, None, "each at its own best learning rate")


GAPS = (
    _paper("3b", -0.029, 39.3e9, "read off a figure"),
    _paper("9b", -0.023, 105e9, "read off a figure"),
    _paper("27b", -0.021, 262e9, "stated"),
    _factory("38.5M", 38.5e6, -0.0621),
    _factory("85M", 85e6, -0.0495, 0.0029),
    _factory("304M", 304e6, -0.0396),
    _factory("1.21B", 1.21e9, -0.0287),
    _tpu("27M", 27e6, -0.072),
    _tpu("112M", 112e6, -0.059),
)
# The first of these is no part of a series over scale; it warns of small ones.
SMALL = f"{FACTORY}: at 9.6M parameters and 12.3M tokens mHC ended 0.030 nats above the plain residual."
