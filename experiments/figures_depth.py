"""Figures whose x axis is depth, and matrices: gains, streams, H_res, and the column error that Sinkhorn leaves.

All show the last evaluation. A sublayer is an attention or a feed-forward part; they alternate, attention first, counted from 1.
"""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mhc_jax.experiments.formats import significant
from mhc_jax.experiments.records import RunRecord
from mhc_jax.experiments.results import Results, Variant
from mhc_jax.experiments.sinkhorn import STDS, reference_curve
from mhc_jax.experiments.style import WIDTH, LineStyle, draw_marked, draw_seeds, hollow_note, legend, line_styles, log_axis, whole_numbers

RES = 2  # column of `learnable` that speaks of H_res
FLOOR = 1e-9  # below the resolution of float32 sums; smaller column errors are drawn here, and curves leave the frame

TITLES = {
    "gain_forward_composite": "Forward, sublayers 1 to l together",
    "gain_backward_composite": "Backward, sublayers l to last together",
    "gain_forward_single": "Forward, sublayer l alone",
    "gain_backward_single": "Backward, sublayer l alone",
}


def multi_stream(results: Results) -> list[Variant]:
    """The variants with more than one residual stream."""
    return [variant for variant in results.variants if variant.records[0].streams > 1]


def with_sinkhorn(results: Results) -> list[Variant]:
    """The variants whose H_res comes from Sinkhorn: they have logits."""
    return [variant for variant in results.variants if np.any(np.isfinite(variant.records[0].stability.logit_std[-1]))]


def gain_over_depth_figure(results: Results) -> Figure:
    """Composite gain (top) and gain of single H_res (bottom) over depth, forward (left) and backward (right)."""
    styles = line_styles(results)
    figure = Figure(figsize=(WIDTH, 6.6), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey="row")
    for axes, (name, title) in zip(panels.flat, TITLES.items(), strict=True):
        for variant in results.variants:
            _over_depth(axes, variant, name, styles[variant.name])
        axes.set_title(title)
    for row, kind in zip(panels, ("composite", "single"), strict=True):
        names = (f"gain_forward_{kind}", f"gain_backward_{kind}")
        log_axis(row[0], [getattr(r.stability, name)[-1] for r in results.records for name in names], (0.8, 2.0))
        row[0].set_ylabel("gain (1 = unchanged)")
    for axes in panels[1]:
        axes.set_xlabel("sublayer l")
        whole_numbers(axes)
    legend(figure, {v.name: styles[v.name] for v in results.variants}, [hollow_note()])
    return figure


def bounded(results: Results) -> list[Variant]:
    """The variants that keep every composite gain within the number of their several streams."""
    return [v for v in multi_stream(results) if max(v.largest("gain_forward_max"), v.largest("gain_backward_max")) <= v.records[0].streams]


def bounded_gain_figure(results: Results) -> Figure:
    """Composite (left) and single (right) backward gain over depth of the variants whose gains are bounded, on a linear axis."""
    styles = line_styles(results)
    variants = bounded(results)
    figure = Figure(figsize=(WIDTH, 3.8), layout="constrained")
    panels = figure.subplots(1, 2)
    titles = {name: TITLES[name] for name in ("gain_backward_composite", "gain_backward_single")}
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        for variant in variants:
            _over_depth(axes, variant, name, styles[variant.name])
        axes.set(title=title, xlabel="sublayer l")
        axes.set_ylim(min(axes.get_ylim()[0], 0.95), max(axes.get_ylim()[1], 1.05))
        whole_numbers(axes)
    panels[0].set_ylabel("gain (1 = unchanged)")
    legend(figure, {v.name: styles[v.name] for v in variants}, [hollow_note()])
    return figure


def matrices_figure(results: Results) -> Figure:
    """H_res of the first, middle and last sublayer and three products, for each variant with several streams (first seed)."""
    variants = multi_stream(results)
    figure = Figure(figsize=(1.4 * WIDTH, 2.7 * len(variants)), layout="constrained")
    rows = figure.subplots(len(variants), 6, squeeze=False)
    for panels, variant in zip(rows, variants, strict=True):
        stability = variant.records[0].stability
        count = stability.res.shape[1]
        half = max(1, count // 2)
        panels[0].set_ylabel(variant.name, fontweight="bold", fontsize=11)
        for axes, index in zip(panels, (0, half - 1, count - 1)):
            trained = " " if stability.learnable[-1, index, RES] else "(kept out of training)"
            heat_map(axes, stability.res[-1, index], f"sublayer {index + 1}\n{trained}")
        products = {
            f"1 to {half}": stability.res_composite[-1, half - 1],
            f"{half + 1} to {count}": stability.res_composite_rest[-1, half],
            f"1 to {count}": stability.res_composite[-1, -1],
        }
        for axes, (span, product) in zip(panels[3:], products.items()):
            heat_map(axes, product, f"product of {span}\n ")
    return figure


def streams_figure(results: Results) -> Figure:
    """Cosine between streams over depth (top), and the root mean square of every stream, a panel a variant (below)."""
    styles = line_styles(results)
    variants = multi_stream(results)
    columns = min(3, len(variants))
    lines = -(-len(variants) // columns)
    figure = Figure(figsize=(WIDTH, 3.0 + 2.6 * lines), layout="constrained")
    grid = figure.add_gridspec(1 + lines, columns, height_ratios=[1.15] + [1.0] * lines)
    cosine = figure.add_subplot(grid[0, :])
    for variant in variants:
        depth = np.arange(variant.records[0].stability.stream_cosine.shape[1])
        draw_seeds(cosine, depth, [r.stability.stream_cosine[-1] for r in variant.records], styles[variant.name])
    cosine.set(title="How alike the streams are (1 = the same direction)", ylabel="mean cosine", xlabel="after sublayer (0 = embedding)")
    _untrained_band(cosine, variants[0].records[0])
    whole_numbers(cosine)
    # A frame of at least a few per cent, so that streams which are equal but for rounding look equal.
    cosine.set_ylim(min(cosine.get_ylim()[0], 0.95), max(cosine.get_ylim()[1], 1.005))
    norms = [r.stability.stream_norm[-1] for variant in variants for r in variant.records[:1]]
    first = None
    for index, variant in enumerate(variants):
        axes = figure.add_subplot(grid[1 + index // columns, index % columns], sharey=first)
        first = first or axes
        norm = variant.records[0].stability.stream_norm[-1]
        for stream in range(norm.shape[1]):
            axes.plot(norm[:, stream], color=styles[variant.name].color, alpha=0.35 + 0.65 * stream / norm.shape[1], linewidth=1.4)
        log_axis(axes, norms)
        whole_numbers(axes)
        axes.set(title=f"{variant.name}: size of each stream", xlabel="after sublayer")
        if index % columns == 0:
            axes.set_ylabel("root mean square")
    band = Line2D([], [], color="#dddddd", linewidth=8, label="H_pre or H_res kept out of training")
    legend(figure, {v.name: styles[v.name] for v in variants}, [band])
    return figure


def column_error_figure(results: Results) -> Figure:
    """Column error of every sublayer against the standard deviation of its logits, beside random logits after as many steps."""
    styles = line_styles(results)
    variants = with_sinkhorn(results)
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    axes = figure.subplots()
    connections = variants[0].records[0].config.model.connections
    median, high = reference_curve(connections.streams, connections.sinkhorn_steps)
    axes.plot(STDS, np.maximum(median, FLOOR**2), color="#777777", marker=".", linewidth=1.3)
    axes.plot(STDS, np.maximum(high, FLOOR**2), color="#777777", marker=".", linewidth=1.3, linestyle="--")
    axes.axhline(float(np.finfo(np.float32).eps), color="#bbbbbb", linewidth=1.0, linestyle=":")
    for variant in variants:
        style = styles[variant.name]
        for record in variant.records:
            stability = record.stability
            faces = [style.color if trained else (1.0, 1.0, 1.0) for trained in stability.learnable[-1, :, RES]]
            error = np.maximum(stability.column_error[-1], FLOOR)
            axes.scatter(stability.logit_std[-1], error, s=34, marker=style.marker, facecolors=faces, edgecolors=[style.color], zorder=3)
    axes.set(xscale="log", yscale="log", ylim=(FLOOR / 1.5, 2))
    axes.set_xticks(STDS, [f"{std:g}" for std in STDS])
    axes.minorticks_off()
    axes.set_xlabel("standard deviation of the logits")
    axes.set_ylabel("largest |column sum - 1|")
    axes.set_title(f"What {connections.sinkhorn_steps} Sinkhorn steps leave undone, one point a sublayer (largest over tokens)")
    random = f"random logits, n = {connections.streams}"
    extra = [
        Line2D([], [], color="#777777", label=f"{random}: median"),
        Line2D([], [], color="#777777", linestyle="--", label=f"{random}: 99th percentile"),
        Line2D([], [], color="#bbbbbb", linestyle=":", label="float32 rounding"),
        hollow_note(),
    ]
    legend(figure, {v.name: styles[v.name] for v in variants}, extra)
    return figure


def _over_depth(axes: Axes, variant: Variant, name: str, style: LineStyle) -> None:
    curves = np.stack([getattr(record.stability, name)[-1] for record in variant.records])
    sublayer = np.arange(1, curves.shape[1] + 1)
    record = variant.records[0]
    # A single stream has no H_res to train, so there is nothing to mark.
    hollow = record.stability.learnable[-1, :, RES] == 0 if record.streams > 1 else np.zeros(len(sublayer), bool)
    draw_marked(axes, sublayer, curves.mean(axis=0), hollow, style)
    if len(curves) > 1:
        axes.fill_between(sublayer, curves.min(axis=0), curves.max(axis=0), color=style.color, alpha=0.18, linewidth=0)


def heat_map(axes: Axes, matrix: np.ndarray, title: str) -> None:
    """A residual matrix [n, n] with its entries written in, and the largest absolute row and column sums under it."""
    reach = max(1.0, float(np.abs(matrix).max()))
    axes.imshow(matrix, cmap="RdBu_r", vmin=-reach, vmax=reach)
    size = 9 if len(matrix) <= 4 else 6
    for (row, column), value in np.ndenumerate(matrix):
        ink = "white" if abs(value) > 0.62 * reach else "#222222"
        # Adding 0 turns a rounded -0.00 into 0.00.
        text = f"{round(value, 2) + 0:.2f}" if abs(value) < 10 else significant(value)
        fitting = size if len(text) <= 5 else 0.7 * size
        axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=fitting)
    axes.set_title(title, fontsize=9.5, loc="center")
    rows, columns = np.abs(matrix.sum(axis=1)).max(), np.abs(matrix.sum(axis=0)).max()
    axes.set_xlabel(f"row sums up to {significant(rows)}\ncolumn sums up to {significant(columns)}", fontsize=8.5)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)


def _untrained_band(axes: Axes, record: RunRecord) -> None:
    """Greys the sublayers whose pre or res mapping is kept out of training."""
    for index in np.flatnonzero((record.stability.learnable[-1, :, [0, RES]] == 0).any(axis=0)):
        axes.axvspan(float(index), float(index) + 1, color="#dddddd", linewidth=0, zorder=0)
