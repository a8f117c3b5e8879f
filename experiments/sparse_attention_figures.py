"""The figures of the study of sparse attention's cost. Every curve says whether it is counted, modelled or published."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from mhc_jax.experiments.attention_times import Times
from mhc_jax.experiments.published_costs import DECODE, PREFILL, K, Published, priced
from mhc_jax.experiments.style import WIDTH
from mhc_jax.plan.attention import Counts

DENSE, TOKEN, PAGES, INDEXER = "#6b6b6b", "#0072B2", "#009E73", "#D55E00"
LAST = 2**20  # position at which the axes of counted curves end


def short(tokens: float) -> str:
    """256, 1.5K, 128K, 1M."""
    if tokens < K:
        return f"{tokens:.0f}"
    if tokens >= 2**20:
        return f"{tokens / 2**20:g}M"
    thousands = tokens / K
    return f"{thousands:.0f}K" if thousands >= 10 else f"{round(thousands, 1):g}K"


def position_axis(axes: Axes, first: float, last: float) -> None:
    """Position on a logarithmic axis, with ticks at powers of four."""
    axes.set_xscale("log", base=2)
    axes.set_xlim(first, last)
    axes.xaxis.set_major_locator(LogLocator(base=4, numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("position of the token")


def counted_figure(counts: Mapping[str, Counts]) -> Figure:
    """FLOPs of one token and layer over its position, a panel for each of prefill and decoding."""
    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    x = np.geomspace(256, LAST, 400)
    for axes, (name, own) in zip(panels, counts.items()):
        for label, flops, color, dashes in (
            ("dense attention", own.dense_flops, DENSE, ()),
            ("sparse attention with its indexer", own.sparse_flops, TOKEN, ()),
            ("of that, the chosen keys", own.sparse.flops, TOKEN, (1.5, 1.5)),
            ("of that, the indexer", own.indexer.flops, INDEXER, (5, 1.5)),
        ):
            axes.plot(x, [flops(t) / 1e9 for t in x], color=color, dashes=dashes, label=f"{label} (counted)")
        here = own.break_even()
        axes.axvline(here, color="black", linewidth=0.8)
        axes.text(here * 1.08, 0.022, f"break-even {short(here)}", va="bottom")
        axes.set_yscale("log")
        axes.set_title(name)
        position_axis(axes, 256, LAST)
    panels[0].set_ylabel("GFLOP a token and layer")
    panels[0].set_ylim(0.02, 400)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def published_figure(counts: Mapping[str, Counts], layers: int) -> Figure:
    """Published dollars over position, and the counted FLOPs at the price that the dense line implies."""
    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    panels = figure.subplots(1, 2)
    published: tuple[Published, Published] = (PREFILL, DECODE)
    for axes, (name, own), curves in zip(panels, counts.items(), published):
        x = np.linspace(0, curves.dense.positions[-1], 600)
        for label, curve, color in (("dense, V3.1-Terminus", curves.dense, DENSE), ("sparse, V3.2-Exp", curves.sparse, TOKEN)):
            axes.plot(curve.positions, curve.dollars, color=color, marker="o", markersize=4.5, clip_on=False, label=f"{label} (published)")
        inferred = priced(own, curves, layers, own.least_flops)
        axes.plot(
            x, [inferred(t) for t in x], color=INDEXER, dashes=(3, 1.5), label="sparse (counted, at the dense line's price of a FLOP)"
        )
        here = curves.break_even()
        axes.axvline(here, color="black", linewidth=0.8)
        axes.text(here + 2.5 * K, 0.97 * curves.dense.dollars[-1], f"published break-even {short(here)}", va="top")
        axes.set_title(f"{name}: {curves.ratio(128 * K):.1f} times cheaper at 128K")
        axes.set_xlim(0, 128 * K)
        axes.set_ylim(0, None)
        axes.set_xticks([32 * K * i for i in range(5)], [short(32 * K * i) for i in range(5)])
        axes.set_xlabel("position of the token")
    panels[0].set_ylabel("dollars a million tokens")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def times_figure(times: Mapping[str, Times], how: str) -> Figure:
    """Microseconds a token of a whole sequence in one layer, "modelled" or "measured", over its length, a panel for each chip."""
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    panels = figure.subplots(1, len(times), sharey=True, squeeze=False)[0]
    x = np.geomspace(2 * K, LAST, 200)
    for axes, (chip, own) in zip(panels, times.items()):
        for label, total, color in (
            ("dense attention", own.dense, DENSE),
            ("sparse, chosen tokens", own.tokens, TOKEN),
            ("sparse, chosen pages", own.pages, PAGES),
        ):
            if total(1.0) is None:
                continue
            axes.plot(x, [(total(s) or np.nan) / s for s in x], color=color, label=f"{label} ({how})")
            if total != own.tokens:
                axes.plot(own.sizes.whole, [(total(s) or np.nan) / s for s in own.sizes.whole], "o", color=color, markersize=4)
        for granularity, color, height in (("tokens", TOKEN, 0.9), ("pages", PAGES, 0.96)):
            if (here := own.break_even(granularity)) is not None and 2 * K < here <= LAST:
                axes.axvline(here, color=color, linewidth=0.8)
                axes.text(here / 1.08, height, short(here), color=color, ha="right", transform=axes.get_xaxis_transform())
        axes.set_yscale("log")
        axes.set_title(chip)
        position_axis(axes, 2 * K, LAST)
        axes.set_xlabel("tokens of the sequence")
    panels[0].set_ylabel("microseconds a token and layer")
    handles = max((axes.get_legend_handles_labels() for axes in panels), key=lambda found: len(found[1]))
    figure.legend(*handles, loc="outside upper center", ncols=3)
    return figure
