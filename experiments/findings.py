"""Plain sentences that follow from the numbers, and from nothing else. Tables and figures are report's part."""

import math

from mhc_jax.experiments import formats
from mhc_jax.experiments.rates import curves, rate_findings, rate_warnings
from mhc_jax.experiments.results import Results, Variant, lowest
from mhc_jax.residual_kinds import KINDS

MOST_NAMES = 6
ROUNDING = 1e-3  # relative; sums of float32 products over many sublayers


def findings(results: Results) -> list[str]:
    """One sentence or two a finding; empty while no run has finished."""
    if not results.variants:
        return []
    few = lowest(results)
    return [*_losses(results), *rate_findings(results), *_gains(few), *_incidents(results), *_cost(few)]


def warnings(results: Results) -> list[str]:
    """What makes a comparison within the list unsound, or weak."""
    records = results.records
    notes = []
    if len({record.summary.data.fingerprint for record in records}) > 1:
        notes.append("The runs did not see the same data: their corpus fingerprints differ, so their losses cannot be compared.")
    if len({record.summary.data.tokenizer for record in records}) > 1:
        notes.append("The runs used different tokenizers, so their losses per token cannot be compared.")
    if len({str(sorted(record.summary.platform.items())) for record in records}) > 1:
        notes.append("The runs were made on different platforms, so their speeds cannot be compared.")
    if records and all(len(variant.records) == 1 for variant in results.variants):
        notes.append(
            "One seed. The spread over seeds is unknown, and without it gaps of a few hundredths of a nat are noise: they can change sign "
            "with the seed."
        )
    return [*notes, *rate_warnings(results)]


def _losses(results: Results) -> list[str]:
    finite = [variant for variant in results.variants if variant.statistics["loss"].mean is not None]
    failed = [variant.name for variant in results.variants if variant not in finite]
    lines = [f"The held-out loss of {_names(failed)} is not finite: training diverged."] if failed else []
    if not finite:
        return lines
    best = min(finite, key=lambda variant: variant.statistics["loss"].mean or 0.0)
    if len(finite) > 1:
        lines.append(f"`{best.name}` has the lowest held-out loss, {formats.mean(best.statistics['loss'], formats.loss)} nats.")
    else:
        lines.append(f"`{best.name}` ends at a held-out loss of {formats.mean(best.statistics['loss'], formats.loss)} nats.")
    in_grid = {name for curve in curves(results) for name in curve.variants}  # these are compared at their best rates instead
    if results.baseline is not None:
        told = [variant for variant in lowest(results).variants if variant in finite and variant.name not in in_grid]
        others = [variant for variant in told if variant is not results.baseline]
        lines += [_gap(variant, results.baseline) for variant in others]
    blind = [v.name for v in finite if (v.statistics["loss"].mean or 0.0) >= (v.statistics["unigram_entropy"].mean or math.inf)]
    if blind:
        lines.append(f"{_names(blind)} did not get below the unigram entropy of the held-out text, so no use of context is shown.")
    return lines


def _gap(variant: Variant, baseline: Variant) -> str:
    value = variant.statistics["loss_gap"]
    if value.mean is None:
        return f"`{variant.name}` has no run with the same seed as a finished run of `{baseline.name}`, so its gap is unknown."
    if abs(value.mean) < 5e-5:
        return f"`{variant.name}` ends level with `{baseline.name}`, to four decimals."
    direction = "below" if value.mean < 0 else "above"
    same_kind = variant.records[0].config.model.residual == baseline.records[0].config.model.residual
    verdict = "" if value.mean < 0 or same_kind else f": here it loses to `{baseline.name}`"
    if value.spread is None:
        certainty = "one seed, so the spread is unknown"
    else:
        error = 2 * value.spread / math.sqrt(value.seeds)
        clear = "clear of" if abs(value.mean) > error else "within"
        certainty = f"over {value.seeds} seeds {clear} twice its standard error of {error / 2:.4f}"
    return f"`{variant.name}` ends {abs(value.mean):.4f} nats {direction} `{baseline.name}`{verdict} ({certainty})."


def _gains(results: Results) -> list[str]:
    kept: list[tuple[str, float, float]] = []  # variants whose bound held, with the largest gains
    lines = []
    for variant in results.variants:
        kind, streams = variant.records[0].config.model.residual, variant.records[0].streams
        forward = variant.largest("gain_forward_max")
        backward = variant.largest("gain_backward_max")
        within = max(forward, backward) <= streams * (1 + ROUNDING)
        gains = f"{formats.significant(forward)} forward and {formats.significant(backward)} backward"
        reach = f"The composite gain of `{variant.name}` reached {gains}"
        if streams == 1:
            continue
        if not math.isfinite(forward) or not math.isfinite(backward):
            lines.append(f"The composite gain of `{variant.name}` did not stay finite.")
        elif KINDS[kind].bounded and within:
            kept.append((variant.name, forward, backward))
        elif KINDS[kind].bounded:
            lines.append(f"{reach}: above the number of streams, {streams}, which its exact row sums rule out. Something is wrong.")
        elif within:
            lines.append(f"{reach}: within the number of streams, {streams}, though nothing in its form bounds it.")
        else:
            lines.append(f"{reach}: it is not bounded.")
    if kept:
        forward, backward = max(gain for _, gain, _ in kept), max(gain for _, _, gain in kept)
        lines.append(
            f"The composite gain of {_names([name for name, _, _ in kept])} stayed at or below {formats.significant(forward)} forward and "
            f"{formats.significant(backward)} backward: bounded, as exact row sums promise (backward at most the number of streams)."
        )
    return lines


def _incidents(results: Results) -> list[str]:
    lines = []
    spikes = [f"`{r.name}` ({formats.count(r.summary.loss_spikes)})" for r in results.records if r.summary.loss_spikes]
    lines.append(f"Loss spikes: {', '.join(spikes)}." if spikes else "No run had a loss spike.")
    skipped = [f"`{r.name}` ({formats.count(r.summary.skipped_steps)})" for r in results.records if r.summary.skipped_steps]
    if skipped:
        lines.append(f"Steps whose loss or gradient was not finite changed nothing: {', '.join(skipped)}.")
    returned = [f"`{r.name}` ({formats.count(r.summary.rollbacks)})" for r in results.records if r.summary.rollbacks]
    if returned:
        lines.append(f"Went back to a checkpoint because of a loss spike, and left data out: {', '.join(returned)}.")
    repeated = {record.summary.data.epochs for record in results.records if record.summary.data.epochs > 1}
    if repeated:
        lines.append(
            f"Training tokens were repeated (up to {formats.significant(max(repeated))} passes), so the losses also measure how well a "
            "variant memorises."
        )
    return lines


def _cost(results: Results) -> list[str]:
    if results.baseline is None:
        return []
    parts = []
    rate = results.baseline.records[0].config.optimizer.learning_rate
    in_grid = {name for curve in curves(results) for name in curve.variants}
    for variant in results.variants:
        ratio = variant.statistics["step_time_ratio"].mean
        same_rate = variant.records[0].config.optimizer.learning_rate == rate  # another takes no other time
        if variant is not results.baseline and ratio is not None and (same_rate or variant.name not in in_grid):
            parts.append(f"`{variant.name}` {ratio:.2f} times")
    return [f"Step time relative to `{results.baseline.name}`: {', '.join(parts)}."] if parts else []


def _names(names: list[str]) -> str:
    """All of a few names; of the dozens that a sweep has, the first ones."""
    shown = names if len(names) <= MOST_NAMES else names[: MOST_NAMES - 1]
    text = ", ".join(f"`{name}`" for name in shown)
    return text if len(shown) == len(names) else f"{text} and {len(names) - len(shown)} others"
