"""What a learning-rate grid says: the best rate of every setting, whether it lies inside the grid, and comparisons at the best and at one
rate. The figure is figures_rates's part.

A setting is what is the same at all rates of a curve, such as a residual kind.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from mhc_jax.config import difference, fields
from mhc_jax.experiments import formats
from mhc_jax.experiments.document import Block, Heading, Paragraph, Table
from mhc_jax.experiments.learning_rates import RATE
from mhc_jax.experiments.results import Results, Statistic, statistic
from mhc_jax.experiments.runs import Run
from mhc_jax.experiments.sweeps import NOT_NAMED, labels

FEWEST = 3  # rates of a curve: with two, each is an edge


@dataclass
class Curve:
    """One setting over learning rates."""

    name: str
    first: Run  # of the list, for what the setting is
    variants: set[str] = field(default_factory=set)  # one a rate
    planned: dict[float, set[int]] = field(default_factory=dict)  # rate to its seeds
    losses: dict[float, dict[int, float]] = field(default_factory=dict)  # rate to seed to held-out loss, nats; NaN if not finite

    @property
    def rates(self) -> list[float]:
        """All rates of the list, rising."""
        return sorted(self.planned)

    def finished(self, rate: float) -> bool:
        """Whether all seeds of a rate have finished; means over different seeds cannot be compared."""
        return self.planned.get(rate, {None}) == set(self.losses.get(rate, ()))

    def loss(self, rate: float) -> Statistic:
        """Over the finished seeds."""
        return statistic(list(self.losses.get(rate, {}).values()))

    @property
    def best(self) -> float | None:
        """The finished rate with the lowest mean loss; None where none has finished with finite losses."""
        means = {rate: self.loss(rate).mean for rate in self.rates if self.finished(rate)}
        finite = {rate: mean for rate, mean in means.items() if mean is not None}
        return min(finite, key=lambda rate: finite[rate]) if finite else None


def curves(results: Results) -> list[Curve]:
    """The settings of the list with at least three learning rates, in its order; finished runs have losses."""
    groups: dict[tuple, Curve] = {}
    losses = {record.name: record.summary.loss for record in results.records}
    for run in results.runs.runs:
        key = tuple((path, value) for path, value in fields(run.config) if path not in (*NOT_NAMED, RATE))
        curve = groups.setdefault(key, Curve("", run))
        rate, seed = run.config.optimizer.learning_rate, run.config.train.seed
        curve.variants.add(run.variant)
        curve.planned.setdefault(rate, set()).add(seed)
        if run.name in losses:
            curve.losses.setdefault(rate, {})[seed] = losses[run.name]
    found = [curve for curve in groups.values() if len(curve.planned) >= FEWEST]
    configs = [curve.first.config for curve in found]
    paths = dict.fromkeys(path for config in configs for path in difference(configs[0], config))
    for curve, name in zip(found, labels(configs, [path for path in paths if path not in (*NOT_NAMED, RATE)])):
        curve.name = name if len(found) > 1 else curve.first.config.model.residual
    return found


def shared_rate(found: Sequence[Curve]) -> float | None:
    """The rate, finished in all curves, at which the mean loss over curves is lowest; None where there is none."""
    means = {}
    for rate in found[0].rates if found else ():
        losses = [curve.loss(rate).mean for curve in found if curve.finished(rate)]
        if len(losses) == len(found) and None not in losses:
            means[rate] = sum(loss for loss in losses if loss is not None)
    return min(means, key=lambda rate: means[rate]) if means else None


def gap(curve: Curve, rate: float | None, other: Curve, other_rate: float | None) -> Statistic:
    """Loss of a curve at a rate minus that of another at its own, over the seeds that both have."""
    ours, theirs = (c.losses.get(r, {}) if r is not None else {} for c, r in ((curve, rate), (other, other_rate)))
    return statistic([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())])


def baseline_curve(results: Results, found: Iterable[Curve]) -> Curve | None:
    """The curve that the list's baseline lies on."""
    if results.runs.baseline is None:
        return None
    return next((curve for curve in found if results.runs.baseline in curve.variants), None)


def rate_warnings(results: Results) -> list[str]:
    """Best rates at the edge of their grid, and grids that are not complete or not the same."""
    notes, found = [], [curve for curve in curves(results) if curve.losses]
    for curve in found:
        open_rates = [rate for rate in curve.rates if not curve.finished(rate)]
        if open_rates:
            notes.append(f"`{curve.name}` has not finished at {_listed(open_rates)}: what is said of its best rate is said of the others.")
        best = curve.best
        if best is None:
            continue
        if best == curve.rates[0]:
            notes.append(f"The best rate of `{curve.name}`, {best:g}, is the lowest of its grid: a lower one may be better.")
        if best == curve.rates[-1]:
            notes.append(f"The best rate of `{curve.name}`, {best:g}, is the highest of its grid: a higher one may be better.")
    if len({tuple(curve.rates) for curve in found}) > 1:
        notes.append("The settings were not tried at the same learning rates: one that was tried at more has had more chances.")
    return notes


def rate_findings(results: Results) -> list[str]:
    """The best rate of every setting, and how they compare at their own best rates and at one rate."""
    found = [curve for curve in curves(results) if curve.losses]
    lines = []
    for curve in found:
        if diverged := [rate for rate in curve.rates if any(not math.isfinite(loss) for loss in curve.losses.get(rate, {}).values())]:
            lines.append(f"`{curve.name}` diverged at {_listed(diverged)}.")
        if curve.best is not None:
            loss = formats.mean_and_spread(curve.loss(curve.best), formats.loss)
            lines.append(f"`{curve.name}` is best at a learning rate of {curve.best:g}: {loss} nats{_seeds(curve.loss(curve.best))}.")
    base, shared = baseline_curve(results, found), shared_rate(found)
    for curve in found if base else ():
        assert base is not None
        if curve is not base:
            lines += _compared(gap(curve, curve.best, base, base.best), curve, base, "Each at its own best rate")
            if shared is not None:
                lines += _compared(gap(curve, shared, base, shared), curve, base, f"Both at {shared:g}")
    return lines


def rate_blocks(results: Results) -> list[Block]:
    """The section on learning rates; nothing where the list is no grid."""
    found = curves(results)
    if not any(curve.losses for curve in found):
        return []
    rates = sorted({rate for curve in found for rate in curve.rates})
    rows = [[curve.name, *(_cell(curve, rate) for rate in rates)] for curve in found]
    blocks: list[Block] = [
        Heading("Learning rates"),
        Table(["held-out loss at", *(f"{rate:g}" for rate in rates)], rows),
        Paragraph(
            "Nats, ± the standard deviation over seeds. `so far`: not all seeds have finished, and the rate is no candidate for the best."
        ),
    ]
    base, shared = baseline_curve(results, found), shared_rate(found)
    header = ["setting", "best rate", "loss there"]
    if base:
        header += [f"gap to {base.name}, each at its best", f"gap at {shared:g}" if shared is not None else "gap at one rate"]
    compared = []
    for curve in found:
        best = curve.best
        row = [curve.name, formats.NONE if best is None else f"{best:g}{_edge(curve, best)}"]
        row.append(formats.NONE if best is None else formats.mean_and_spread(curve.loss(best), formats.loss))
        if base:
            pairs = (gap(curve, best, base, base.best), gap(curve, shared, base, shared))
            row += [formats.NONE if curve is base else formats.mean_and_spread(pair, formats.gap) for pair in pairs]
        compared.append(row)
    text = "The best rate is the one with the lowest mean over seeds, and its loss is from the same runs, so it flatters a little."
    if base:
        text += f" Gaps are to `{base.name}` with the same seed; ± is their standard deviation over seeds."
    if base and shared is not None:
        text += f" {shared:g} is the rate with the lowest mean loss over all settings."
    return [*blocks, Table(header, compared), Paragraph(text)]


def _compared(pair: Statistic, curve: Curve, base: Curve, where: str) -> list[str]:
    if pair.mean is None:
        return []
    direction = "below" if pair.mean < 0 else "above"
    if pair.spread is None:
        certainty = "one seed, so the spread is unknown"
    else:
        error = pair.spread / math.sqrt(pair.seeds)
        certainty = f"{pair.seeds} seeds, {'clear of' if abs(pair.mean) > 2 * error else 'within'} twice the standard error of {error:.4f}"
    return [f"{where}, `{curve.name}` ends {abs(pair.mean):.4f} nats {direction} `{base.name}` ({certainty})."]


def _cell(curve: Curve, rate: float) -> str:
    text = formats.mean_and_spread(curve.loss(rate), formats.loss)
    return text if curve.finished(rate) or rate not in curve.losses else f"{text}, so far"


def _edge(curve: Curve, best: float) -> str:
    return ", at the edge" if best in (curve.rates[0], curve.rates[-1]) else ""


def _seeds(loss: Statistic) -> str:
    return f" over {loss.seeds} seeds" if loss.seeds > 1 else ", one seed"


def _listed(rates: Sequence[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in rates)
