"""Colours, axes and legends that every figure shares. No figure is drawn here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from mhc_jax.experiments.results import Results

WIDTH = 9.0  # inches of every figure; text is sized for this width

# Okabe and Ito's palette, told apart with every common colour blindness; a residual kind has the same colour in every figure.
COLOURS = {
    "residual": "#6b6b6b",
    "hc": "#D55E00",
    "static_hc": "#E69F00",
    "mhc": "#0072B2",
    "identity_hc": "#009E73",
    "mhc_lite": "#56B4E9",
    "kromhc": "#CC79A7",
}
REGISTERED = ("#000000", "#8c6d1f", "#5d3a9b")  # kinds from outside the library, in the order of a list
# Curves often lie on top of each other, as gains of exactly 1 do; drawn from wide to narrow, each stays visible.
WIDTHS = {"residual": 3.8, "static_hc": 2.6, "hc": 2.2, "mhc": 2.2, "mhc_lite": 1.7, "identity_hc": 1.2, "kromhc": 1.2}
# Variants of one residual kind, as in a sweep, share its colour and differ in dashes, marker and lightness.
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 1.5), (1.5, 1.5), (7, 1.5, 1.5, 1.5), (9, 3))
MARKERS = ("o", "s", "^", "D", "v")

RC: Any = {  # Any: matplotlib types the keys as a literal of all its settings
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e5e8",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "figure.dpi": 130,
}


@dataclass(frozen=True)
class LineStyle:
    """How a variant is drawn."""

    color: tuple[float, float, float]
    dashes: tuple[float, ...]
    marker: str
    width: float  # points; narrower curves lie on top

    @property
    def zorder(self) -> float:
        """Drawing order among curves."""
        return 3 - 0.1 * self.width


def styled():
    """A context in which figures are made: every drawing function runs inside it, and no global state remains."""
    return rc_context(RC)


def line_styles(results: Results) -> dict[str, LineStyle]:
    """The style of every variant of the list, finished or not, so that it does not change while the list fills up."""
    of_kind: dict[str, list[str]] = {}
    for name in results.runs.variants:
        of_kind.setdefault(results.runs.first(name).config.model.residual, []).append(name)
    colours = {kind: REGISTERED[index % 3] for index, kind in enumerate(kind for kind in of_kind if kind not in COLOURS)} | COLOURS
    styles = {}
    for kind, names in of_kind.items():
        base, width = np.array(to_rgb(colours[kind])), WIDTHS.get(kind, 1.7)
        for index, name in enumerate(names):
            light = 0.6 * index / len(names)
            red, green, blue = base + (1 - base) * light
            # Dashes are lengths in line widths; this keeps them equally long for wide and narrow lines.
            dashes = tuple(2 * length / width for length in DASHES[index % len(DASHES)])
            styles[name] = LineStyle((red, green, blue), dashes, MARKERS[index % len(MARKERS)], width)
    return styles


def line(style: LineStyle) -> dict[str, Any]:
    """Keyword arguments of `Axes.plot`."""
    return {"color": style.color, "dashes": style.dashes, "linewidth": style.width, "zorder": style.zorder}


def draw_seeds(axes: Axes, x: np.ndarray, ys: Sequence[np.ndarray], style: LineStyle) -> None:
    """Draws the mean of equally long curves, with a band from the lowest to the highest when there are several seeds."""
    stacked = np.stack(ys)
    axes.plot(x, stacked.mean(axis=0), **line(style))
    if len(ys) > 1:
        axes.fill_between(x, stacked.min(axis=0), stacked.max(axis=0), color=style.color, alpha=0.18, linewidth=0)


def draw_marked(axes: Axes, x: np.ndarray, y: np.ndarray, hollow: np.ndarray, style: LineStyle) -> None:
    """Draws a curve with a marker a point; the points where `hollow` holds are left white inside."""
    axes.plot(x, y, **line(style))
    size = (16 if len(x) <= 24 else 8) * (1 + style.width / 2)
    # Hollow markers lie above all others, so that a full one of another variant does not hide what they say.
    for chosen, face, zorder in ((~hollow, style.color, style.zorder), (hollow, "white", 4.0)):
        axes.scatter(x[chosen], y[chosen], s=size, marker=style.marker, facecolors=[face], edgecolors=[style.color], zorder=zorder)


def log_axis(axes: Axes, values: Sequence[np.ndarray], at_least: tuple[float, float] | None = None) -> None:
    """Makes y logarithmic with plain numbers at 1, 2, 5, and covers the finite positive values and `at_least`."""
    pool = np.concatenate([np.ravel(value) for value in values]) if values else np.array([])
    pool = pool[np.isfinite(pool) & (pool > 0)]
    ends = [*(at_least or ()), *((pool.min(), pool.max()) if pool.size else ())]
    axes.set_yscale("log")
    if ends:
        axes.set_ylim(min(ends) / 1.12, max(ends) * 1.12)
    decades = np.log10(max(ends) / min(ends)) if ends else 0
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,), numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def whole_numbers(axes: Axes) -> None:
    """Ticks of x at whole numbers only."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))


def legend(figure: Figure, styles: Mapping[str, LineStyle], extra: Sequence[Line2D] = ()) -> None:
    """One legend for all panels, above them."""
    handles = []
    for name, style in styles.items():
        handle = Line2D([], [], color=style.color, linewidth=style.width, label=name)
        handle.set_dashes(style.dashes or (None, None))
        handles.append(handle)
    handles += extra
    columns = _legend_columns([str(handle.get_label()) for handle in handles])
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, handlelength=2.6)


def _legend_columns(labels: Sequence[str]) -> int:
    """The most columns whose labels fit side by side; a legend is filled column by column, and each is as wide as its longest label."""
    for columns in range(len(labels), 1, -1):
        rows = -(-len(labels) // columns)
        widths = [max(len(label) for label in labels[start : start + rows]) for start in range(0, len(labels), rows)]
        # About 115 characters fit; a line sample and the space around it take as much as eight.
        if sum(width + 8 for width in widths) <= 115:
            return columns
    return 1


def hollow_note() -> Line2D:
    """Legend entry of the hollow markers of `draw_marked`."""
    return Line2D(
        [], [], color="#777777", marker="o", markerfacecolor="white", linestyle="none", label="hollow: H_res kept out of training"
    )
