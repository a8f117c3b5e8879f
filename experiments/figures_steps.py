"""Figures whose x axis is the training step: losses, gradient norm, largest composite gain."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mhc_jax.experiments.results import Results, paired
from mhc_jax.experiments.style import WIDTH, draw_seeds, legend, line, line_styles, log_axis, whole_numbers


def loss_figure(results: Results) -> Figure:
    """Held-out loss minus the baseline's of the same seed (left; absent without a finished baseline), and held-out loss (right)."""
    styles = line_styles(results)
    baseline = results.baseline
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    panels = figure.subplots(1, 2 if baseline else 1, squeeze=False)[0]
    losses = panels[-1]
    for variant in results.variants:
        records = variant.records
        # The loss before training is far above all others and would flatten them.
        after = records[0].eval.step > 0
        draw_seeds(losses, records[0].eval.step[after], [r.eval.loss[after] for r in records], styles[variant.name])
    entropies = {record.summary.unigram_entropy for record in results.records}
    for entropy in entropies:
        losses.axhline(entropy, color="#888888", linewidth=1.2, linestyle=":")
    losses.set(title="Held-out loss", xlabel="optimizer step", ylabel="cross-entropy (nats per token)")
    if baseline:
        gaps = []
        for variant in results.variants:
            pairs = paired(variant.records, baseline.records)
            curves = [_gap(a.eval.step, a.eval.loss, b.eval.step, b.eval.loss) for a, b in pairs]
            if curves:
                gaps += curves
                draw_seeds(panels[0], curves[0][0], [gap for _, gap in curves], styles[variant.name])
        _focus(panels[0], gaps)
        title = f"Held-out loss minus that of {baseline.name}\n(same seed; below 0 is better)"
        panels[0].set(title=title, xlabel="optimizer step", ylabel="loss gap (nats per token)")
        losses.set_title("Held-out loss\n")
    for axes in panels:
        whole_numbers(axes)
    note = Line2D([], [], color="#888888", linestyle=":", linewidth=1.2, label="unigram entropy")
    legend(figure, {v.name: styles[v.name] for v in results.variants}, [note])
    return figure


def gradient_figure(results: Results) -> Figure:
    """Global gradient norm before clipping: every step in the background, a running mean in front; first seed of each variant."""
    styles = line_styles(results)
    figure = Figure(figsize=(WIDTH, 4.0), layout="constrained")
    axes = figure.subplots()
    for variant in results.variants:
        train = variant.records[0].train
        style = styles[variant.name]
        axes.plot(train.step, train.grad_norm, color=style.color, alpha=0.22, linewidth=0.7)
        axes.plot(train.step, running_mean(train.grad_norm, window=max(1, len(train.step) // 30)), **line(style))
    limits = sorted({record.config.optimizer.clip_norm for record in results.records})
    for limit in limits:
        axes.axhline(limit, color="#888888", linewidth=1.2, linestyle="--")
    log_axis(axes, [variant.records[0].train.grad_norm for variant in results.variants], (min(limits), max(limits)))
    seeds = " (first seed)" if len(results.records) > len(results.variants) else ""
    axes.set(title=f"Gradient norm before clipping{seeds}", xlabel="optimizer step", ylabel="global gradient norm")
    note = Line2D([], [], color="#888888", linestyle="--", linewidth=1.2, label="clipped above")
    legend(figure, {v.name: styles[v.name] for v in results.variants}, [note])
    return figure


def attention_logit_figure(results: Results) -> Figure:
    """Largest attention logit of every step, over all layers, heads and tokens; first seed of each variant."""
    styles = line_styles(results)
    figure = Figure(figsize=(WIDTH, 3.8), layout="constrained")
    axes = figure.subplots()
    for variant in results.variants:
        train = variant.records[0].train
        axes.plot(train.step, train.max_attention_logit, **line(styles[variant.name]))
    log_axis(axes, [variant.records[0].train.max_attention_logit for variant in results.variants], (1.0, 2.0))
    seeds = " (first seed)" if len(results.records) > len(results.variants) else ""
    axes.set(title=f"Largest attention logit{seeds}", xlabel="optimizer step", ylabel="largest logit before the softmax")
    legend(figure, {v.name: styles[v.name] for v in results.variants})
    return figure


def gain_over_time_figure(results: Results) -> Figure:
    """Largest composite gain over depth at every evaluation, forward (left) and backward (right)."""
    styles = line_styles(results)
    figure = Figure(figsize=(WIDTH, 4.0), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, name, title in zip(panels, ("gain_forward", "gain_backward"), ("Forward", "Backward"), strict=True):
        for variant in results.variants:
            curves = [getattr(record.eval, name) for record in variant.records]
            draw_seeds(axes, variant.records[0].eval.step, curves, styles[variant.name])
        axes.set(title=f"{title} signal: largest composite gain over depth", xlabel="optimizer step")
    # The axis is shared, so its range must cover both panels.
    log_axis(panels[0], [np.concatenate((record.eval.gain_forward, record.eval.gain_backward)) for record in results.records], (0.8, 2.0))
    panels[0].set_ylabel("gain (1 = unchanged)")
    legend(figure, {v.name: styles[v.name] for v in results.variants})
    return figure


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` values, over those that exist near the ends; [steps] to [steps]."""
    kernel = np.ones(window)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def _gap(step: np.ndarray, loss: np.ndarray, base_step: np.ndarray, base_loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Steps that both runs were evaluated at, and the difference of their losses there."""
    common, here, there = np.intersect1d(step, base_step, return_indices=True)
    return common, loss[here] - base_loss[there]


def _focus(axes, curves: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Limits y to the gaps after the first third of the run: early gaps can be a hundred times larger and mean little."""
    last = max((step.max() for step, _ in curves), default=0.0)
    late = np.concatenate([gap[step >= last / 3] for step, gap in curves] or [np.zeros(1)])
    late = late[np.isfinite(late)]
    reach = max(0.005, 1.25 * np.abs(late).max(initial=0.0))
    axes.set_ylim(-reach, reach)
