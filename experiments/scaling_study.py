"""A run list over scale read as a scaling study: which runs belong together, the fits, and their intervals. Words and tables are the
part of scaling_report, pictures of scaling_figures.

N is what `nn.count` calls active: parameters that a token is multiplied with, so without the input embedding and the experts that it does
not visit, and with the output head and the connections. FLOPs are counted by `plan.flops` (forward and backward, causal attention, mHC's
mappings and mixing), and are more than 6 N D.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np

from mhc_jax.config import Config, ModelConfig, override
from mhc_jax.experiments.results import Results
from mhc_jax.experiments.scaling_isoflop import PowerLaw, Profile, common_budgets, optimum_law, profiles
from mhc_jax.experiments.scaling_law import Compute, Law, TooFewPoints, exponents, fit_compute, fit_law
from mhc_jax.experiments.scaling_points import Collected, Points, RunLoss, bootstrap, bootstrap_law, collect
from mhc_jax.nn.count import count_parameters
from mhc_jax.plan.flops import training_flops

RESAMPLES = 200

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class LawFit:
    """The law of one residual kind."""

    law: Law
    compute: Compute  # FLOPs as k N^p D, through the sizes
    drawn: tuple[Law, ...]  # of resampled runs; empty where there are too few runs for intervals
    error: float  # root mean square of the residuals of log L

    def values(self, drawn: Law | None = None) -> np.ndarray:
        """E, A, B, alpha, beta and both exponents of compute, of the fit or of a resampled one; [7]."""
        law = drawn or self.law
        return np.array([law.E, law.A, law.B, law.alpha, law.beta, *exponents(law, self.compute)])


@dataclass(frozen=True, eq=False)
class IsoFlop:
    """Profiles of one residual kind, and the power laws of their optima."""

    profiles: tuple[Profile, ...]
    parameters: PowerLaw | None
    tokens: PowerLaw | None
    drawn: np.ndarray | None  # [resamples, 2], exponents of resampled runs


@dataclass(frozen=True, eq=False)
class Kind:
    """The runs of one residual kind and what they give; a refusal says how many points are needed."""

    collected: Collected
    fit: LawFit | TooFewPoints
    isoflop: IsoFlop


@dataclass(frozen=True, eq=False)
class Gap:
    """Loss of a kind minus the plain residual's, of runs alike in all else, and a straight line of it in log10 C."""

    names: tuple[str, ...]  # [P], sizes
    points: Points  # `losses` are gaps; N, D and FLOPs are those of the plain residual
    line: np.ndarray | None  # slope (nats a decade) and value at `center`
    center: float  # mean of log10 C
    drawn: np.ndarray | None  # [resamples, 2], lines of resampled runs


@lru_cache(maxsize=1024)
def active_parameters(model: ModelConfig) -> int:
    """N of a config."""
    return count_parameters(model).active


def tokens_of(config: Config) -> int:
    """Training tokens of a run that finishes."""
    return config.train.steps * config.tokens_per_step


def is_scaling(results: Results) -> bool:
    """Whether the list varies size and number of tokens, each at least three times, as a law needs, and beside them only the residual
    kind and the seed: settings that differ in more would be one point."""
    configs = [results.runs.first(variant).config for variant in results.runs.variants]
    sizes = {(config.model.dim, config.model.num_layers) for config in configs}
    tokens = {tokens_of(config) for config in configs}
    if min(len(sizes), len(tokens)) < 3:
        return False
    return len({(c.model.residual, active_parameters(c.model), tokens_of(c)) for c in configs}) == len(configs)


def run_losses(results: Results) -> dict[str, list[RunLoss]]:
    """All runs of the list, finished or not, by residual kind."""
    done = {record.name: record.summary.loss for record in results.records}
    found: dict[str, list[RunLoss]] = {}
    for run in results.runs.runs:
        config = run.config
        flops = training_flops(config, config.data.seq_len).total * tokens_of(config)
        loss = RunLoss(run.name, active_parameters(config.model), tokens_of(config), flops, config.train.seed, done.get(run.name))
        found.setdefault(config.model.residual, []).append(loss)
    return found


def kinds(results: Results, resamples: int = RESAMPLES) -> dict[str, Kind]:
    """Every residual kind with its fits; fits that lack points say what they need."""
    found = {}
    for name, runs in run_losses(results).items():
        collected = collect(runs)
        parameters, flops = np.array([run.parameters for run in runs]), np.array([run.flops for run in runs])
        budgets = common_budgets(parameters, flops)
        found[name] = Kind(collected, _law_fit(collected.points, resamples), _isoflop(collected.points, budgets, resamples))
    return found


def gaps(results: Results, resamples: int = RESAMPLES) -> dict[str, Gap]:
    """Every other kind against the plain residual, paired run by run: same size, tokens and seed."""
    done = {run.name: run for runs in run_losses(results).values() for run in runs if run.loss is not None and np.isfinite(run.loss)}
    base: dict[Config, RunLoss] = {}
    for run in results.runs.runs:
        if run.config.model.residual == "residual" and run.name in done:
            base[_apart_from_kind(run.config)] = done[run.name]
    pairs: dict[str, list[tuple[str, RunLoss]]] = {}
    for run in results.runs.runs:
        key = _apart_from_kind(run.config)
        if run.config.model.residual != "residual" and run.name in done and key in base:
            plain, own = base[key], done[run.name]
            assert plain.loss is not None and own.loss is not None
            gap = RunLoss(run.name, plain.parameters, plain.tokens, plain.flops, plain.seed, own.loss - plain.loss)
            size = f"{run.config.model.dim}x{run.config.model.num_layers}"
            pairs.setdefault(run.config.model.residual, []).append((size, gap))
    return {kind: _gap(found, resamples) for kind, found in pairs.items()}


def line_of(points: Points, center: float) -> np.ndarray:
    """Slope and value at `center` of the gaps in log10 C, least squares; [2].

    Raises:
      TooFewPoints: fewer than three points, or all at one budget.
    """
    x = np.log10(points.flops)
    if len(set(zip(points.parameters.tolist(), points.tokens.tolist()))) < 3 or np.ptp(x) < 0.1:
        raise TooFewPoints("a line of the gap over compute needs at least 3 pairs of different compute")
    return np.polyfit(x - center, points.mean, 1)


def _law_fit(points: Points, resamples: int) -> LawFit | TooFewPoints:
    try:
        law = fit_law(points.parameters, points.tokens, points.mean)
    except TooFewPoints as refusal:
        return refusal

    drawn = _if_enough(lambda: bootstrap_law(points, law, resamples=resamples)) or ()
    error = float(np.sqrt(np.mean(np.log(law.loss(points.parameters, points.tokens) / points.mean) ** 2)))
    compute = fit_compute(points.parameters, points.flops / points.tokens)
    return LawFit(law, compute, drawn, error)


def _isoflop(points: Points, budgets: np.ndarray, resamples: int) -> IsoFlop:
    def laws(resampled: Points) -> np.ndarray:
        found = profiles(resampled, budgets)
        return np.array([optimum_law(found).exponent, optimum_law(found, "tokens").exponent])

    found = profiles(points, budgets)
    parameters, tokens = _if_enough(lambda: optimum_law(found)), _if_enough(lambda: optimum_law(found, "tokens"))
    drawn = None if parameters is None else _if_enough(lambda: bootstrap(points, laws, resamples=resamples))
    return IsoFlop(found, parameters, tokens, drawn)


def _gap(found: list[tuple[str, RunLoss]], resamples: int) -> Gap:
    points = collect([gap for _, gap in found]).points
    names: Mapping[tuple[int, int], str] = {(gap.parameters, gap.tokens): size for size, gap in found}
    sizes = tuple(names[int(n), int(d)] for n, d in zip(points.parameters, points.tokens))
    center = float(np.log10(points.flops).mean())
    line = _if_enough(lambda: line_of(points, center))
    drawn = None if line is None else _if_enough(lambda: bootstrap(points, lambda p: line_of(p, center), resamples=resamples))
    return Gap(sizes, points, line, center, drawn)


def _if_enough(ask: Callable[[], T]) -> T | None:
    try:
        return ask()
    except TooFewPoints:
        return None


def _apart_from_kind(config: Config) -> Config:
    return override(config, {"model.residual": "residual", "name": "compared"})
