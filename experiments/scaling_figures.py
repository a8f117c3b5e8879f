"""Figures of a scaling study. Solid lines end where the data end; dashed ones are extrapolated."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from mhc_jax.experiments.scaling_points import interval
from mhc_jax.experiments.scaling_published import GAPS, PublishedGap
from mhc_jax.experiments.scaling_study import Gap, Kind, LawFit
from mhc_jax.experiments.style import COLOURS, WIDTH

BEYOND = 10.0  # how far a law is drawn past its data
DASHED = (4.0, 2.0)


def law_figure(found: Mapping[str, Kind]) -> Figure:
    """Loss over tokens, a curve a size; a panel for each residual kind."""
    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axes, (name, kind) in zip(panels, found.items()):
        points = kind.collected.points
        sizes = np.unique(points.parameters)
        for n, color in zip(sizes, _shades(len(sizes))):
            own = points.parameters == n
            _points(axes, points.tokens[own], points.losses[own], color, _short(n))
            if isinstance(kind.fit, LawFit):
                ends = points.tokens[own].min(), points.tokens[own].max()
                law = kind.fit.law
                _within_and_beyond(axes, ends, lambda d, law=law, n=n: law.loss(n, d), color)
        if isinstance(kind.fit, LawFit):
            axes.axhline(kind.fit.law.E, color="#888888", linestyle=":", linewidth=1.2)
        _counts(axes)
        axes.set(title=name, xlabel="training tokens D")
        axes.legend(title="active parameters N", fontsize=8, title_fontsize=8)
    panels[0].set_ylabel("held-out loss (nats per token)")
    return figure


def isoflop_figure(found: Mapping[str, Kind]) -> Figure:
    """Loss over size at equal compute, a panel for each residual kind; the optima over compute in the last one."""
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    *panels, last = figure.subplots(1, len(found) + 1, squeeze=False)[0]
    for axes, (name, kind) in zip(panels, found.items()):
        for profile, color in zip(kind.isoflop.profiles, _shades(len(kind.isoflop.profiles))):
            axes.plot(profile.parameters, profile.losses, "o", color=color, markersize=5, label=f"{profile.flops:.1e}")
            if profile.parabola is not None:
                x = np.geomspace(profile.parameters[0], profile.parameters[-1], 60)
                axes.plot(x, np.polyval(profile.parabola, np.log(x)), color=color)
            if profile.optimum is not None:
                axes.plot(profile.optimum, profile.lowest, "*", color=color, markersize=13, markeredgecolor="black", markeredgewidth=0.6)
        _counts(axes)
        axes.set(title=name, xlabel="active parameters N")
        axes.legend(title="FLOPs", fontsize=8, title_fontsize=8)
        best = [p for p in kind.isoflop.profiles if p.optimum is not None]
        if not best:
            continue
        color = COLOURS[name]
        last.plot([p.flops for p in best], [p.optimum for p in best], "*", color=color, markersize=11)
        law = kind.isoflop.parameters
        if law is not None:
            flops = [p.flops for p in best]
            _within_and_beyond(last, (min(flops), max(flops)), law, color, f"{name}: exponent {law.exponent:.2f}")
    limits = np.array([axes.get_ylim() for axes in panels])
    for axes in panels:  # the last panel has another axis, so that the figure cannot share one
        axes.set_ylim(limits[:, 0].min(), limits[:, 1].max())
    panels[0].set_ylabel("held-out loss (nats per token)")
    last.set(title="lowest points", xlabel="FLOPs C")
    last.set_visible(bool(last.lines))
    if last.lines:  # an empty axis has no logarithm
        _counts(last)
        last.set_yscale("log")
        last.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        last.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        last.yaxis.set_minor_formatter(NullFormatter())
    if last.get_legend_handles_labels()[1]:
        last.legend(fontsize=8)
    return figure


def gap_figure(found: Mapping[str, Gap]) -> Figure:
    """Loss minus the plain residual's over compute: the list's runs (left) and published ones (right)."""
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    here, there = figure.subplots(1, 2, sharey=True, width_ratios=(1.3, 1))
    for kind, gap in found.items():
        names = list(dict.fromkeys(gap.names))
        for name, marker in zip(names, "os^Dv<>pPX*hH"):
            own = np.array([size == name for size in gap.names])
            _points(here, gap.points.flops[own], gap.points.losses[own], COLOURS[kind], f"{kind}, {name}", marker)
        if gap.line is not None:
            ends = gap.points.flops.min(), gap.points.flops.max()
            _within_and_beyond(here, ends, lambda c, gap=gap: np.polyval(gap.line, np.log10(c) - gap.center), COLOURS[kind])
        if gap.drawn is not None:
            x = np.geomspace(gap.points.flops.min(), BEYOND * gap.points.flops.max(), 60)
            low, high = interval(np.array([np.polyval(line, np.log10(x) - gap.center) for line in gap.drawn]))
            here.fill_between(x, low, high, color=COLOURS[kind], alpha=0.15, linewidth=0)
    _published(there, GAPS)
    for axes in (here, there):
        axes.axhline(0, color="#888888", linewidth=1)
        axes.set_xscale("log")
        axes.set_xlabel("FLOPs of the plain residual's training")
    here.set(title="Loss minus the plain residual's, here", ylabel="loss gap (nats per token)")
    here.legend(fontsize=8, loc="best")
    there.set_title("mHC elsewhere (published)")
    there.legend(fontsize=7, loc="lower right")
    return figure


def _published(axes: Axes, gaps: Sequence[PublishedGap]) -> None:
    for source, marker in zip(dict.fromkeys(gap.source for gap in gaps), "sD^v"):
        own = [gap for gap in gaps if gap.source == source]
        x, y = [gap.flops for gap in own], [gap.gap for gap in own]
        axes.errorbar(
            x, y, yerr=[gap.error or 0 for gap in own], fmt=marker, color="#333333", markerfacecolor="white", markersize=6, label=source
        )


def _points(axes: Axes, x: np.ndarray, losses: np.ndarray, color, label: str, marker: str = "o") -> None:
    """The mean over seeds as a point, all seeds as a bar."""
    low, high = np.nanmin(losses, axis=1), np.nanmax(losses, axis=1)
    axes.vlines(x, low, high, color=color, linewidth=1.2)
    axes.plot(x, np.nanmean(losses, axis=1), marker, color=color, markersize=5, label=label)


def _within_and_beyond(axes: Axes, ends: tuple[float, float], law, color, label: str | None = None) -> None:
    inside, outside = np.geomspace(*ends, 40), np.geomspace(ends[1], BEYOND * ends[1], 20)
    axes.plot(inside, law(inside), color=color, label=label)
    axes.plot(outside, law(outside), color=color, dashes=DASHED, linewidth=1.3)


def _counts(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=8))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _short(value: float) -> str:
    """75K, 1.7M, 3e11."""
    if value >= 1e9:
        return f"{value:.0e}".replace("e+", "e")
    return f"{value / 1e6:.2g}M" if value >= 9.95e5 else f"{value / 1e3:.3g}K"


def _shades(count: int) -> list:
    return [matplotlib.colormaps["viridis"](x) for x in np.linspace(0.05, 0.85, max(1, count))]
