"""IsoFLOP profiles: at a fixed number of FLOPs, which size ends lowest? Pure functions on arrays.

Hoffmann et al. (arXiv 2203.15556, section 3.2): a parabola of the loss in log N for each budget, its lowest point as the optimum, and power
laws of the optima in C. Nothing is extrapolated: a lowest point outside the sizes is none.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.interpolate import PchipInterpolator

from mhc_jax.experiments.scaling_law import TooFewPoints
from mhc_jax.experiments.scaling_points import Points

LEAST_SIZES = 3  # a parabola has three coefficients
TOLERANCE = 0.02  # of log C: budgets are met up to whole steps


@dataclass(frozen=True, eq=False)
class Profile:
    """One budget."""

    flops: float
    parameters: np.ndarray  # [K], rising
    losses: np.ndarray  # [K], at this budget
    parabola: np.ndarray | None  # [3], of the loss in log N, highest power first; None with fewer than three sizes
    optimum: float | None  # N of the lowest point, where it lies within the sizes
    tokens: float | None  # D there

    @property
    def lowest(self) -> float | None:
        """Loss at the optimum, nats."""
        return None if self.optimum is None or self.parabola is None else float(np.polyval(self.parabola, np.log(self.optimum)))


@dataclass(frozen=True)
class PowerLaw:
    """y = factor * C^exponent."""

    factor: float
    exponent: float

    def __call__(self, flops: np.ndarray) -> np.ndarray:
        return self.factor * np.power(flops, self.exponent)


def common_budgets(parameters: np.ndarray, flops: np.ndarray) -> np.ndarray:
    """Budgets that every size has been trained up to: medians over the sizes of the smallest, the second and so on, kept within all
    sizes' ranges. Rising, without repetition; sizes with one budget alone have no say."""
    sizes = [np.unique(flops[parameters == n]) for n in np.unique(parameters)]
    sizes = [budgets for budgets in sizes if len(budgets) > 1]
    if not sizes:
        return np.array([])
    ranks = min(len(budgets) for budgets in sizes)
    medians = [np.median([budgets[rank] for budgets in sizes]) for rank in range(ranks)]
    low, high = max(budgets[0] for budgets in sizes), min(budgets[-1] for budgets in sizes)
    return np.unique(np.clip(medians, low, high)) if low < high else np.array([])


def profiles(points: Points, budgets: Sequence[float] | np.ndarray) -> tuple[Profile, ...]:
    """A profile for each budget, in FLOPs.

    A size whose runs do not meet a budget to 2 % is read between its runs, by a monotone cubic in log C (PCHIP), and never beyond them.
    """
    curves = []
    for n in np.unique(points.parameters):
        own = points.parameters == n
        x = np.unique(np.log(points.flops[own]))
        y = np.array([np.mean(points.mean[own][np.log(points.flops[own]) == value]) for value in x])
        curves.append((n, x, y, np.median(points.flops[own] / points.tokens[own])))
    return tuple(_profile(float(flops), curves) for flops in budgets)


def optimum_law(found: Sequence[Profile], of: str = "optimum") -> PowerLaw:
    """The power law of the optima ("optimum": N, "tokens": D) in C; least squares in logs.

    Raises:
      TooFewPoints: fewer than two budgets have an optimum.
    """
    usable = [profile for profile in found if profile.optimum is not None]
    if len(usable) < 2:
        raise TooFewPoints(f"a power law of the optimum needs at least 2 budgets with an optimum within the sizes; there are {len(usable)}")
    exponent, log_factor = np.polyfit(np.log([p.flops for p in usable]), np.log([getattr(p, of) for p in usable]), 1)
    return PowerLaw(float(np.exp(log_factor)), float(exponent))


def _profile(flops: float, curves: Sequence[tuple[float, np.ndarray, np.ndarray, float]]) -> Profile:
    at = np.log(flops)
    read = [(n, _read(x, y, at), per_token) for n, x, y, per_token in curves if x[0] - TOLERANCE <= at <= x[-1] + TOLERANCE]
    parameters, losses, per_token = np.array(read).reshape(-1, 3).T
    if len(parameters) < LEAST_SIZES:
        return Profile(flops, parameters, losses, None, None, None)
    # Centred for the fit, as powers of log N alone are nearly one direction, and shifted back after it.
    center = np.log(parameters).mean()
    shape = np.poly1d(np.polyfit(np.log(parameters) - center, losses, 2))
    parabola = np.poly1d(shape(np.poly1d([1, -center]))).coeffs
    lowest = -shape.coeffs[1] / (2 * shape.coeffs[0]) + center if len(shape.coeffs) == 3 and shape.coeffs[0] > 0 else np.nan
    if not np.log(parameters[0]) <= lowest <= np.log(parameters[-1]):
        return Profile(flops, parameters, losses, parabola, None, None)
    tokens = flops / np.exp(np.interp(lowest, np.log(parameters), np.log(per_token)))
    return Profile(flops, parameters, losses, parabola, float(np.exp(lowest)), float(tokens))


def _read(x: np.ndarray, y: np.ndarray, at: float) -> float:
    nearest = int(np.argmin(np.abs(x - at)))
    if len(x) == 1 or abs(x[nearest] - at) <= TOLERANCE:
        return float(y[nearest])
    return float(PchipInterpolator(x, y)(at))
