"""The tables of a report: losses, stability, cost, config differences, and the paper's numbers beside the measured ones."""

from collections.abc import Callable

from mhc_jax.config import Config, difference, fields
from mhc_jax.experiments import formats
from mhc_jax.experiments.document import Table
from mhc_jax.experiments.published import PUBLISHED
from mhc_jax.experiments.results import Results, Variant


def loss_table(results: Results) -> Table:
    """Final held-out losses and gaps to the baseline."""
    baseline = results.runs.baseline
    header = ["variant", "seeds", "final loss", *([f"gap to {baseline}"] if baseline else []), "best loss", "unigram entropy"]
    rows = []
    for variant in results.variants:
        s = variant.statistics
        gap = [_gap(variant, results)] if baseline else []
        final = formats.mean_and_spread(s["loss"], formats.loss)
        rows.append(
            [variant.name, str(len(variant.records)), final, *gap]
            + [formats.mean(s[name], formats.loss) for name in ("best_loss", "unigram_entropy")]
        )
    return Table(header, rows)


def stability_table(results: Results) -> Table:
    """Composite gains, gradient norm, clipping and spikes; skipped steps and roll-backs where there were some."""
    columns: dict[str, tuple[str, Callable[[float], str]]] = {
        "gain forward, last": ("gain_forward", formats.significant),
        "gain forward, largest": ("gain_forward_max", formats.significant),
        "gain backward, last": ("gain_backward", formats.significant),
        "gain backward, largest": ("gain_backward_max", formats.significant),
        "gradient norm": ("grad_norm", formats.significant),
        "attention logit, largest": ("max_attention_logit", formats.significant),
        "clip rate": ("clip_rate", formats.percent),
        "loss spikes a run": ("loss_spikes", lambda value: f"{value:.2g}"),
    }
    # Columns of zeros would stand in nearly every report.
    for title, name in (("skipped steps a run", "skipped_steps"), ("roll-backs a run", "rollbacks")):
        if any(getattr(record.summary, name) for record in results.records):
            columns[title] = (name, lambda value: f"{value:g}")
    return _table(results, columns)


def cost_table(results: Results) -> Table:
    """Speed, memory and parameters."""
    columns: dict[str, tuple[str, Callable[[float], str]]] = {
        "tokens per second": ("tokens_per_second", formats.count),
        "step time": ("step_seconds", lambda value: f"{formats.significant(value)} s"),
        f"overhead over {results.runs.baseline}": ("step_time_ratio", lambda value: f"{100 * (value - 1):+.1f} %"),
        "memory": ("memory_bytes", formats.mebibytes),
        "parameters": ("parameters", formats.count),
        "of the connections": ("connection_parameters", formats.count),
    }
    if results.runs.baseline is None:
        columns = {name: column for name, column in columns.items() if column[0] != "step_time_ratio"}
    return _table(results, columns)


def config_table(results: Results) -> Table | None:
    """The config fields that differ between variants, the seed left out; None when nothing does."""
    runs = [results.runs.first(name) for name in results.runs.variants]
    paths = dict.fromkeys(path for run in runs for path in difference(runs[0].config, run.config) if path not in ("name", "train.seed"))
    if not paths:
        return None
    return Table(["variant", *paths], [[run.variant, *(_field(run.config, path) for path in paths)] for run in runs], words=True)


def published_table(results: Results) -> Table | None:
    """The paper's numbers beside those of the list; None when the list has no variant of the paper's kinds."""
    rows = []
    for number in PUBLISHED:
        variants = [variant for variant in results.variants if variant.records[0].config.model.residual == number.residual]
        measured = "; ".join(_measured(number.measure, variant, results, named=len(variants) > 1) for variant in variants)
        rows.append([f"{number.residual}: {number.quantity}", f"{number.value} ({number.status})", measured or "not measured"])
    compared = {number.residual for number in PUBLISHED}
    kinds = {run.config.model.residual for run in results.runs.runs}
    return Table(["quantity", "paper, 27B", "this list"], rows, words=True) if kinds & compared else None


def _table(results: Results, columns: dict[str, tuple[str, Callable[[float], str]]]) -> Table:
    rows = [[v.name, *(formats.mean(v.statistics[key], form) for key, form in columns.values())] for v in results.variants]
    return Table(["variant", *columns], rows)


def _gap(variant: Variant, results: Results) -> str:
    if variant is results.baseline:
        return formats.NONE
    gap = variant.statistics["loss_gap"]
    text = formats.mean_and_spread(gap, formats.gap)
    return f"{text} (one seed)" if gap.seeds == 1 else text


def _measured(measure: str, variant: Variant, results: Results, *, named: bool) -> str:
    s = variant.statistics
    # The paper compares with the plain residual; a gap to any other baseline would stand beside its numbers for the wrong reason.
    comparable = results.runs.baseline is not None and results.runs.first(results.runs.baseline).config.model.residual == "residual"
    if measure == "gain":
        text = formats.significant(max(variant.largest("gain_forward_max"), variant.largest("gain_backward_max")))
    elif not comparable:
        text = formats.NONE
    elif measure == "loss_gap":
        text = formats.mean_and_spread(s["loss_gap"], formats.gap)
    else:
        text = formats.mean(s["step_time_ratio"], lambda value: f"{100 * (value - 1):.1f} %")
    return f"{variant.name}: {text}" if named else text


def _field(config: Config, path: str) -> str:
    known = dict(fields(config))  # a field of a group that this config has not, or the other way round, is missing
    return str(known[path]) if path in known else formats.NONE
