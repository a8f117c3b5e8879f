"""What DeepSeek-V3.1-Terminus and DeepSeek-V3.2-Exp cost a token at a position, as DeepSeek published it; and what that implies.

Source: the figure of inference costs of arXiv 2512.02556 (H800 at 2 dollars an hour), whose lines are straight between the vertices below;
these were read off the vector drawing. Dense is V3.1-Terminus, sparse V3.2-Exp; the two differ in attention alone.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mhc_jax.plan.attention import Counts, crossing

SOURCE = "arXiv 2512.02556, figure of inference costs (H800, 2 dollars an hour), vertices read off the drawing"
K = 1024
DOLLARS_PER_SECOND = 2 / 3600  # of one GPU


@dataclass(frozen=True)
class Curve:
    """Dollars for a million tokens over the position of the token: straight between vertices."""

    positions: tuple[float, ...]  # tokens
    dollars: tuple[float, ...]

    def __call__(self, position: float) -> float:
        return float(np.interp(position, self.positions, self.dollars))

    def slope(self, piece: int = -1) -> float:
        """Dollars for a million tokens that one more earlier token costs, on a piece between two vertices; the last by default."""
        return float(np.diff(self.dollars)[piece] / np.diff(self.positions)[piece])


@dataclass(frozen=True)
class Published:
    """The two curves of prefill or of decoding."""

    dense: Curve
    sparse: Curve

    def ratio(self, position: float) -> float:
        """How many times dearer dense attention is."""
        return self.dense(position) / self.sparse(position)

    def break_even(self) -> float:
        """The position from which on sparse attention is cheaper."""
        return crossing(self.sparse, self.dense, last=self.dense.positions[-1])


PREFILL = Published(Curve((0, 128 * K), (0.053, 0.666)), Curve((0, 6.6 * K, 128 * K), (0.061, 0.100, 0.187)))
DECODE = Published(Curve((0, 128 * K), (0.0705, 2.155)), Curve((0, 2.1 * K, 101.6 * K, 128 * K), (0.095, 0.146, 0.2275, 0.249)))


def rate(slope: float, flops_per_key: int, layers: int) -> float:
    """FLOP/s of one GPU at which the slope of a published line pays for this many FLOPs a key and layer."""
    return flops_per_key * layers / (slope / 1e6 / DOLLARS_PER_SECOND)


def priced(counts: Counts, published: Published, layers: int, flops: Callable[[float], float]) -> Callable[[float], float]:
    """A counted curve in dollars: every FLOP at the price that the published line of dense attention implies, on top of where that begins.

    Nothing is taken from the published line of sparse attention, so that the two can be held against each other.
    """
    begins = published.dense.dollars[0]
    price = published.dense.slope() / (counts.dense.flops_per_key * layers)
    return lambda position: begins + price * layers * flops(position)
