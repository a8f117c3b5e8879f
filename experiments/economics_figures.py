"""The figures of the study of economics. All is counted; what is published is marked so."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from mhc_jax.config import Config
from mhc_jax.experiments.published_costs import DECODE, PREFILL, K
from mhc_jax.experiments.sparse_attention_figures import position_axis
from mhc_jax.experiments.style import WIDTH
from mhc_jax.plan.cost import ACCELERATORS, training_bill
from mhc_jax.plan.flops import Flops, cache_bytes, decode_flops, training_flops
from mhc_jax.plan.serving import Service
from mhc_jax.plan.traffic import LEVELS, Rows, zipf_misses
from mhc_jax.plan.v4 import FLASH, PRO, V4_WEIGHTS, V32_WEIGHTS

GREY, BLUE, GREEN, ORANGE, YELLOW, PURPLE, SKY = "#6b6b6b", "#0072B2", "#009E73", "#D55E00", "#E69F00", "#CC79A7", "#56B4E9"
GROUPS = {  # parts of a token's FLOPs that are drawn as one
    "experts and dense feed-forward": (("experts", "dense feed-forward", "router"), SKY),
    "attention projections": (("attention projections",), BLUE),
    "attention scores and values": (("attention scores and values",), GREY),
    "indexer": (("indexer projections", "indexer scores"), ORANGE),
    "mHC and Engram": (("stream mappings", "stream mixing", "Engram"), GREEN),
    "unembedding": (("unembedding",), YELLOW),
}


ON_THE_LEFT = ("3b_1t", "DeepSeek-V3", "V4-Flash")  # runs named on the left of their points, where there is room
LABEL = {"facecolor": "white", "edgecolor": "none", "pad": 1.2}


def money(dollars: float) -> str:
    """$300, $5K, $5M, $2B."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if dollars >= unit:
            return f"${dollars / unit:g}{name}"
    return f"${dollars:g}"


def training_figure(runs: Mapping[str, tuple[float, float]], mfu: float, dollars_per_hour: float) -> Figure:
    """Lines of equal dollars over active parameters and tokens, with named runs (active parameters, tokens) as points."""
    figure = Figure(figsize=(WIDTH, 5.4), layout="constrained")
    axes = figure.subplots()
    pair = training_bill(6, 1, ACCELERATORS["H800"], mfu=mfu, dollars_per_hour=dollars_per_hour).dollars  # of one parameter and token
    low, high = 3e8, 4e11
    for power in range(3, 9):
        product = 10.0**power / pair
        axes.plot([low, high], [product / low, product / high], color=BLUE, linewidth=1.2)
        at = min((0.1 * product) ** 0.5, 0.6 * high)  # below the runs, or at the right
        axes.text(at, product / at, money(10.0**power), color=BLUE, ha="center", va="center", bbox=LABEL)
    for name, (active, trained) in runs.items():
        axes.plot(active, trained, "o", color=ORANGE, markersize=6)
        side, ha = (-9, "right") if name in ON_THE_LEFT else (9, "left")
        axes.annotate(name, (active, trained), xytext=(side, 0), textcoords="offset points", ha=ha, va="center", bbox=LABEL)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(2e10, 1e14), xlabel="active parameters", ylabel="tokens")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e12:g}T" if value >= 1e12 else f"{value / 1e9:g}B"))
    axes.set_title(f"H800 at {dollars_per_hour:g} dollars an hour, {100 * mfu:.0f} % MFU; 6 FLOPs a parameter and token (counted)")
    return figure


def shares_figure(bars: Mapping[str, Flops]) -> Figure:
    """GFLOP of a token in training, by part."""
    figure = Figure(figsize=(WIDTH, 0.55 * len(bars) + 1.6), layout="constrained")
    axes = figure.subplots()
    names = list(bars)[::-1]
    left = np.zeros(len(names))
    for label, (parts, color) in GROUPS.items():
        width = np.array([sum(bars[name].parts[part] for part in parts) for name in names]) / 1e9
        axes.barh(names, width, left=left, color=color, label=label, height=0.72)
        left += width
    for row, total in enumerate(left):
        axes.text(total + 0.01 * left.max(), row, f"{total:,.0f}", va="center")
    axes.set_xlim(0, 1.08 * left.max())
    axes.set_xlabel("GFLOP a token, forward and backward (counted)")
    axes.grid(axis="y", visible=False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def ideas_figure(base: Config, variants: Mapping[str, Config], streams: Mapping[str, Mapping[str, float]]) -> Figure:
    """Left: FLOPs of a variant over the base's, over context. Right: time of the streams' traffic as a share of a forward pass."""
    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    x = np.unique(np.geomspace(2 * K, 1024 * K, 60).astype(int))
    for (label, config), color, dashes in zip(variants.items(), (BLUE, GREEN, ORANGE, "black"), ((), (5, 1.5), (), (1.5, 1.5))):
        ratio = [training_flops(config, int(t)).total / training_flops(base, int(t)).total for t in x]
        left.plot(x, ratio, color=color, dashes=dashes, label=label)
    left.axhline(1, color=GREY, linewidth=1)
    left.set_yscale("log")
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    left.yaxis.set_minor_formatter(NullFormatter())
    left.set_ylim(0.08, 1.8)
    position_axis(left, 2 * K, 1024 * K)
    left.set_xlabel("tokens of a training sequence")
    left.set_title("training FLOPs a token, over plain dense V3's")
    left.legend(loc="lower left")
    height, names = 0.8 / len(streams), list(next(iter(streams.values())))
    for row, ((label, shares), color) in enumerate(zip(streams.items(), (SKY, BLUE))):
        at = np.arange(len(names)) + (row - (len(streams) - 1) / 2) * height
        right.barh(at, [100 * shares[name] for name in names], height=0.92 * height, color=color, label=label)
        for y, name in zip(at, names):
            right.text(100 * shares[name] + 0.2, y, f"{100 * shares[name]:.1f}", va="center", fontsize=9)
    right.set_yticks(range(len(names)), names)
    right.invert_yaxis()
    right.set_xlim(0, 115 * max(max(shares.values()) for shares in streams.values()))
    right.grid(axis="y", visible=False)
    right.set_xlabel("% of a forward pass")
    right.set_title("reading and writing the streams")
    right.legend(loc="lower right")
    return figure


def memory_figure(tables: Mapping[str, Rows], needs: Mapping[str, float]) -> Figure:
    """Left: tokens a second that each memory feeds one chip, beside what a chip asks for. Right: misses of a cache of hot rows."""
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.35, 1))
    height = 0.8 / len(tables)
    for row, ((label, rows), color) in enumerate(zip(tables.items(), (SKY, BLUE))):
        at = np.arange(len(LEVELS)) + (row - (len(tables) - 1) / 2) * height
        left.barh(at, [level.tokens_per_second(rows) for level in LEVELS], height=0.92 * height, color=color, label=label)
    styles: Sequence[tuple[float, ...]] = ((), (5, 1.5), (1.5, 1.5))
    for (label, rate), dashes in zip(needs.items(), styles):
        left.axvline(rate, color=ORANGE, dashes=dashes or (None, None), linewidth=1.6, label=label)
    left.set_xscale("log")
    left.set_xlim(300, 3e9)
    left.set_yticks(range(len(LEVELS)), [level.name.replace(", ", ",\n") for level in LEVELS])
    left.invert_yaxis()
    left.grid(axis="y", visible=False)
    left.set_xlabel("tokens a second and chip")
    left.set_title("what each memory can feed (data sheets)")
    x = np.geomspace(1e-5, 1, 80)
    for exponent, color in ((0.8, GREY), (1.0, BLUE), (1.2, GREEN)):
        right.plot(100 * x, [100 * zipf_misses(share, 1.6e7, exponent) for share in x], color=color, label=f"exponent {exponent:g}")
    right.set_xscale("log")
    right.set_ylim(0, 100)
    right.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    right.set_xlabel("% of rows in the faster memory")
    right.set_ylabel("% of reads that miss them")
    right.set_title("if reads follow Zipf's law (assumed)")
    right.legend(loc="upper right")
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def serving_figure(services: Mapping[str, Service]) -> Figure:
    """Dollars a million tokens over the tokens that each sees, roofline and published, prefill and decoding."""
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    x = np.unique(np.geomspace(K, 1024 * K, 80).astype(int))
    for axes, title, curves, method in (
        (panels[0], "prefill", PREFILL, Service.prefill_dollars),
        (panels[1], "decoding", DECODE, Service.decode_dollars),
    ):
        for (label, service), published, color in zip(services.items(), (curves.dense, curves.sparse), (GREY, BLUE)):
            axes.plot(x, [method(service, int(t)) for t in x], color=color, dashes=(4, 1.5), label=f"{label}, roofline")
            known = x[x <= 128 * K]
            axes.plot(known, [published(t) for t in known], color=color, linewidth=2.6, label=f"{label}, published")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_title(title)
        position_axis(axes, K, 1024 * K)
        axes.set_xlabel("tokens that the token sees")
    panels[0].set_ylabel("dollars a million tokens")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def v4_figure(dense: Config, sparse: Config) -> Figure:
    """Left: FLOPs of a decoded token, one in 8 bits counting 1. Right: the cache of one sequence."""
    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    x = np.unique(np.geomspace(K, 1024 * K, 80).astype(int))
    lines: list[Line2D] = []
    for label, flops, cache, color in (
        ("V3, dense", lambda t: decode_flops(dense, t - 1).weighted(V32_WEIGHTS), lambda t: cache_bytes(dense, t, "float8"), GREY),
        ("V3.2, sparse", lambda t: decode_flops(sparse, t - 1).weighted(V32_WEIGHTS), lambda t: cache_bytes(sparse, t, "float8"), BLUE),
        ("V4-Pro", lambda t: PRO.decode_flops(t).weighted(V4_WEIGHTS), PRO.cache_bytes, ORANGE),
        ("V4-Flash", lambda t: FLASH.decode_flops(t).weighted(V4_WEIGHTS), FLASH.cache_bytes, YELLOW),
    ):
        lines += left.plot(x, [flops(int(t)) / 1e9 for t in x], color=color, label=label)
        right.plot(x, [cache(int(t)) / 1e9 for t in x], color=color, label=label)
    for axes, unit, title in ((left, "GFLOP, one in 8 bits counting 1", "a decoded token"), (right, "GB", "cache of one sequence")):
        _plain_log(axes)
        axes.set_ylabel(unit)
        axes.set_title(title)
        position_axis(axes, K, 1024 * K)
        axes.set_xlabel("tokens before it, itself included")
    figure.legend(handles=lines, loc="outside upper center", ncols=4)
    return figure


def _plain_log(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
