"""Means, spreads and paired gaps over seeds, and results.json. Reading one run folder is records' part, words and pictures come later."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mhc_jax.experiments.records import RunRecord, read_run, steps_done
from mhc_jax.experiments.runs import RunList, load_runs, run_folder
from mhc_jax.files import AnyPath
from mhc_jax.train.folder import finished

# Numbers of summary.json that are averaged over seeds as they are.
AVERAGED = (
    "loss",
    "best_loss",
    "unigram_entropy",
    "gain_forward",
    "gain_backward",
    "gain_forward_max",
    "gain_backward_max",
    "grad_norm",
    "clip_rate",
    "loss_spikes",
    "skipped_steps",
    "rollbacks",
    "tokens_per_second",
    "step_seconds",
    "memory_bytes",
    "parameters",
    "active_parameters",
    "connection_parameters",
)


MOST_SHOWN = 20  # variants that have a curve, a panel or a sentence of their own


@dataclass(frozen=True)
class Statistic:
    """A number over seeds."""

    mean: float | None  # None when there is no value, or when one was not finite
    spread: float | None  # sample standard deviation over seeds; None for fewer than two
    seeds: int  # values that went in


@dataclass(frozen=True, eq=False)
class Variant:
    """The finished runs of one variant."""

    name: str
    records: tuple[RunRecord, ...]  # at least one
    statistics: Mapping[str, Statistic]  # AVERAGED, `max_attention_logit`, and with a baseline `loss_gap` and `step_time_ratio`

    def largest(self, name: str) -> float:
        """Largest value of a number of summary.json over seeds; NaN when one was not finite."""
        return float(np.max([getattr(record.summary, name) for record in self.records]))


@dataclass(frozen=True)
class Missing:
    """A run of the list that has not finished."""

    name: str
    steps_done: int
    steps: int


@dataclass(frozen=True, eq=False)
class Results:
    """A run list and what has become of it."""

    runs: RunList
    variants: tuple[Variant, ...]  # those with a finished run, in the order of the list
    missing: tuple[Missing, ...]

    @property
    def records(self) -> tuple[RunRecord, ...]:
        """All finished runs."""
        return tuple(record for variant in self.variants for record in variant.records)

    @property
    def baseline(self) -> Variant | None:
        """The variant that the others are compared with, if it is named and has a finished run."""
        return next((variant for variant in self.variants if variant.name == self.runs.baseline), None)


def lowest(results: Results, most: int = MOST_SHOWN) -> Results:
    """The results with the baseline and `most` variants of lowest loss, for what cannot show hundreds; the same where there are fewer."""
    if len(results.variants) <= most:
        return results
    means = {variant.name: variant.statistics["loss"].mean for variant in results.variants}
    ranked = sorted(means, key=lambda name: math.inf if (mean := means[name]) is None else mean)
    names = {*ranked[:most], results.runs.baseline}
    runs = tuple(run for run in results.runs.runs if run.variant in names)
    variants = tuple(variant for variant in results.variants if variant.name in names)
    return dataclasses.replace(results, runs=dataclasses.replace(results.runs, runs=runs), variants=variants)


def statistic(values: Sequence[float]) -> Statistic:
    """Mean and sample standard deviation; a value that is not finite leaves no mean, since none is honest."""
    if not values or not np.all(np.isfinite(values)):
        return Statistic(None, None, len(values))
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Statistic(float(np.mean(values)), spread, len(values))


def paired(records: Sequence[RunRecord], baseline: Sequence[RunRecord]) -> list[tuple[RunRecord, RunRecord]]:
    """Each record with the baseline's record of the same seed; records without a partner are left out."""
    by_seed = {record.seed: record for record in baseline}
    return [(record, by_seed[record.seed]) for record in records if record.seed in by_seed]


def load_results(folder: AnyPath) -> Results:
    """Reads a list's folder: runlist.json and the finished runs.

    Raises:
      UserError: there is no list, a run has another config than the list says, or a file of a finished run is missing or half-written.
    """
    runs = load_runs(folder)
    records: dict[str, list[RunRecord]] = {}
    missing = []
    for run in runs.runs:
        path = run_folder(folder, run)
        if finished(run.config, path) is not None:
            records.setdefault(run.variant, []).append(read_run(run, path))
        else:
            missing.append(Missing(run.name, steps_done(path), run.config.train.steps))
    baseline = records.get(runs.baseline, []) if runs.baseline is not None else None
    variants = tuple(Variant(name, tuple(records[name]), _statistics(records[name], baseline)) for name in runs.variants if name in records)
    return Results(runs, variants, tuple(missing))


def results_json(results: Results) -> dict[str, Any]:
    """The content of results.json; a number that is not finite becomes null."""
    variants = {
        variant.name: {"runs": {record.name: dataclasses.asdict(record.summary) for record in variant.records}}
        | {name: dataclasses.asdict(value) for name, value in variant.statistics.items()}
        for variant in results.variants
    }
    return {
        "name": results.runs.name,
        "question": results.runs.question,
        "baseline": results.runs.baseline,
        "variants": _without_nan(variants),
        "missing": [run.name for run in results.missing],
    }


def _statistics(records: Sequence[RunRecord], baseline: Sequence[RunRecord] | None) -> dict[str, Statistic]:
    result = {name: statistic([getattr(record.summary, name) for record in records]) for name in AVERAGED}
    result["max_attention_logit"] = statistic([float(record.train.max_attention_logit.max()) for record in records])
    if baseline is not None:
        pairs = paired(records, baseline)
        result["loss_gap"] = statistic([a.summary.loss - b.summary.loss for a, b in pairs])
        result["step_time_ratio"] = statistic([a.summary.step_seconds / b.summary.step_seconds for a, b in pairs])
    return result


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
