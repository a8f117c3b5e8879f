"""The figure of a learning-rate grid: held-out loss over the rate, a curve a setting. What it says in words is rates's part."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

from mhc_jax.experiments.rates import curves
from mhc_jax.experiments.results import Results
from mhc_jax.experiments.style import WIDTH, legend, line, line_styles


def is_rate_grid(results: Results) -> bool:
    """Whether the list has a setting at several learning rates, and some of it is there to be seen."""
    return any(np.isfinite(list(losses.values())).any() for curve in curves(results) for losses in curve.losses.values())


def rates_figure(results: Results) -> Figure:
    """A point a run and a line through the means over seeds; the best rate is ringed, and runs that diverged are crosses at the top."""
    found, styles = curves(results), line_styles(results)
    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    axes = figure.subplots()
    for curve in found:
        style = styles[curve.first.variant]
        means = {rate: mean for rate in curve.rates if (mean := curve.loss(rate).mean) is not None}
        axes.plot(list(means), list(means.values()), **line(style))
        for rate, losses in curve.losses.items():
            finite = [loss for loss in losses.values() if np.isfinite(loss)]
            axes.plot([rate] * len(finite), finite, style.marker, color=style.color, markersize=5)
            if len(finite) < len(losses):
                axes.plot(rate, 0.97, "x", color=style.color, markersize=9, transform=axes.get_xaxis_transform())
        if curve.best is not None:
            axes.plot(curve.best, means[curve.best], "o", markersize=13, markerfacecolor="none", markeredgecolor=style.color)
    rates = sorted({rate for curve in found for rate in curve.rates})
    axes.set_xscale("log")
    axes.set_xlim(rates[0] / 1.2, rates[-1] * 1.2)
    axes.xaxis.set_major_locator(FixedLocator(rates))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(title="Held-out loss over the learning rate", xlabel="learning rate", ylabel="held-out loss (nats per token)")
    marks = [
        Line2D([], [], color="#777777", marker="o", markersize=11, markerfacecolor="none", linestyle="none", label="best of its grid"),
        Line2D([], [], color="#777777", marker="x", markersize=8, linestyle="none", label="diverged"),
    ]
    legend(figure, {curve.name: styles[curve.first.variant] for curve in found}, marks)
    return figure
