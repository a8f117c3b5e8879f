"""Runs as points (N, D) of a scaling study, several seeds a point, and their resampling. What is fitted to them is the part of scaling_law
and scaling_isoflop.

The bootstrap draws points with replacement, and within each drawn point its seeds with replacement: runs of one point differ by the noise
of a seed, points also by what the law gets wrong, and an interval should hold both.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mhc_jax.errors import UserError
from mhc_jax.experiments.scaling_law import COEFFICIENTS, Law, TooFewPoints, check_points, refit

LEVEL = 0.9  # of every interval
LEAST_FOR_INTERVALS = 8  # different points; with six most resamples do not determine the law, and the others are all alike
TRIES = 20  # draws of a resample that determines what is asked, for each one that is wanted


@dataclass(frozen=True, eq=False)
class Points:
    """P points of one variant with up to S seeds each."""

    parameters: np.ndarray  # [P], N
    tokens: np.ndarray  # [P], D
    flops: np.ndarray  # [P], of the whole training
    losses: np.ndarray  # [P, S], nats; NaN where a seed has not run or its loss was not finite

    def __post_init__(self):
        if not np.isfinite(self.losses).any(axis=1).all():
            raise UserError("a point without a finite loss is none; leave it out")

    @property
    def mean(self) -> np.ndarray:
        """Loss of each point, the mean over its seeds; [P]."""
        return np.nanmean(self.losses, axis=1)

    @property
    def runs(self) -> int:
        """How many losses there are."""
        return int(np.isfinite(self.losses).sum())

    def drawn(self, chosen: np.ndarray, losses: np.ndarray) -> "Points":
        """Points `chosen` [Q] of these with other losses [Q, S]."""
        return Points(self.parameters[chosen], self.tokens[chosen], self.flops[chosen], losses)


@dataclass(frozen=True)
class RunLoss:
    """One run of a study, finished or not."""

    name: str
    parameters: int
    tokens: int
    flops: float
    seed: int
    loss: float | None  # None where the run has not finished


@dataclass(frozen=True)
class Collected:
    """Runs as points, and those that could not be used."""

    points: Points
    missing: tuple[str, ...]  # not finished
    not_finite: tuple[str, ...]


def collect(runs: Sequence[RunLoss]) -> Collected:
    """Joins runs of equal N and D; runs without a finite loss are left out and named."""
    usable = [run for run in runs if run.loss is not None and np.isfinite(run.loss)]
    seeds = sorted({run.seed for run in runs})
    places = list(dict.fromkeys((run.parameters, run.tokens, run.flops) for run in usable))
    losses = np.full((len(places), len(seeds)), np.nan)
    for run in usable:
        losses[places.index((run.parameters, run.tokens, run.flops)), seeds.index(run.seed)] = run.loss
    parameters, tokens, flops = np.array(places, np.float64).reshape(-1, 3).T
    return Collected(
        Points(parameters, tokens, flops, losses),
        tuple(run.name for run in runs if run.loss is None),
        tuple(run.name for run in runs if run.loss is not None and not np.isfinite(run.loss)),
    )


def resample(points: Points, rng: np.random.Generator) -> Points:
    """As many points, drawn with replacement, each with its seeds drawn with replacement."""
    chosen = rng.integers(len(points.losses), size=len(points.losses))
    losses = np.sort(points.losses[chosen], axis=1)  # NaN last
    finite = np.isfinite(losses).sum(axis=1)[:, None]
    drawn = np.take_along_axis(losses, (rng.random(losses.shape) * finite).astype(int), axis=1)
    return points.drawn(chosen, np.where(np.arange(losses.shape[1])[None] < finite, drawn, np.nan))


def bootstrap(points: Points, statistic: Callable[[Points], np.ndarray], *, resamples: int, seed: int = 0) -> np.ndarray:
    """The statistic of resampled points, [resamples, ...]; a resample that does not determine it (TooFewPoints) is drawn again.

    The same `seed` draws the same points and seeds from any Points of the same shape.

    Raises:
      TooFewPoints: hardly any resample determines the statistic, because there are too few points.
    """
    rng = np.random.default_rng(seed)
    values: list[np.ndarray] = []
    for _ in range(TRIES * resamples):
        try:
            values.append(statistic(resample(points, rng)))
        except TooFewPoints:
            continue
        if len(values) == resamples:
            return np.stack(values)
    raise TooFewPoints(f"only {len(values)} of {TRIES * resamples} resamples determine what is asked: there are too few points")


def bootstrap_law(points: Points, law: Law, *, resamples: int, seed: int = 0) -> tuple[Law, ...]:
    """The law of resampled points, each searched from `law`, that of all points.

    Raises:
      TooFewPoints: there are fewer than eight different points, or as `bootstrap`; a resample needs five.
    """
    check_points(points.parameters, points.tokens, least=LEAST_FOR_INTERVALS)

    def determined(drawn: Points) -> np.ndarray:
        check_points(drawn.parameters, drawn.tokens, least=COEFFICIENTS)
        return np.stack([drawn.parameters, drawn.tokens, drawn.mean])

    drawn = bootstrap(points, determined, resamples=resamples, seed=seed)
    return tuple(refit(law, drawn[:, 0], drawn[:, 1], drawn[:, 2]))


def interval(values: np.ndarray, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """Both ends of the percentile interval over axis 0."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high
