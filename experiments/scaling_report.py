"""The section of a run list's report on scaling laws: tables, sentences, figures. The fits are the part of scaling_study."""

from collections.abc import Mapping

import numpy as np

from mhc_jax.experiments import formats
from mhc_jax.experiments.document import Block, Heading, Items, Paragraph, Picture, Table
from mhc_jax.experiments.results import Results
from mhc_jax.experiments.scaling_figures import BEYOND, gap_figure, isoflop_figure, law_figure
from mhc_jax.experiments.scaling_law import Law, optimum
from mhc_jax.experiments.scaling_points import LEVEL, interval
from mhc_jax.experiments.scaling_published import GAPS, SMALL
from mhc_jax.experiments.scaling_study import Gap, Kind, LawFit, gaps, kinds
from mhc_jax.experiments.study import to_png

COEFFICIENTS = ("E", "A", "B", "alpha", "beta", "N_opt ~ C^", "D_opt ~ C^")


def scaling_blocks(results: Results) -> list[Block]:
    """The section; figures are drawn where there is something to see."""
    found, gap = kinds(results), gaps(results)
    blocks: list[Block] = [
        Heading("Scaling laws"),
        Paragraph(
            "N are active parameters: those that a token is multiplied with, so without the input embedding and the experts that it does "
            "not visit, and with the output head and the connections. D are training tokens. FLOPs C are counted part by part "
            "(`mhc_jax/plan/flops.py`), attention's scores and mHC's mappings included; the table says how far they are from 6 N D. "
            "Every run is trained for its own D, with warm-up and drops of the learning rate as shares of its steps."
        ),
        *_absent(found),
        points_table(found),
    ]
    run = {name: kind for name, kind in found.items() if len(kind.collected.points.losses)}
    read = {name: kind for name, kind in run.items() if any(len(profile.parameters) for profile in kind.isoflop.profiles)}
    if not run:
        return blocks
    percent = f"{100 * LEVEL:.0f} %"
    blocks += [
        Heading("L(N, D) = E + A / N^alpha + B / D^beta", level=3),
        law_table(found),
        Paragraph(
            f"Losses in nats. In brackets, {percent} intervals of a bootstrap that draws points, and seeds within a point, with "
            "replacement. The last two rows follow from the law and from a power law of the counted FLOPs in N."
        ),
        _picture(
            "law",
            "Loss over tokens",
            "Points are means over seeds, bars reach from the lowest to the highest seed, curves are the fitted law at each size, dashed "
            f"beyond the data (up to {BEYOND:g} times). The dotted line is E, where all curves would end.",
            lambda: law_figure(run),
        ),
        Heading("Equal compute", level=3),
        isoflop_table(found),
        *_optima(found),
    ]
    if read:
        picture = _picture(
            "isoflop",
            "Loss over size at equal compute",
            "One curve a budget: a parabola in log N through the losses of all sizes; a star is its lowest point, and a budget without "
            "one has it outside the sizes. On the right, the stars over compute: their slope is the exponent of the best size.",
            lambda: isoflop_figure(read),
        )
        blocks.append(picture)
    if gap:
        blocks += [
            Heading("Gap to the plain residual", level=3),
            Paragraph("Same size, tokens and seed, so the difference has mHC's extra FLOPs (and parameters) on one side."),
            gap_table(gap),
            Items([*map(_line, gap.items()), *_at_equal_compute(found)]),
            _picture(
                "gap",
                "Gap over compute",
                f"Every point is one size and number of tokens, its bar reaches over the seeds; the line is fitted, its band the {percent} "
                "interval, dashed beyond the data. The right panel has other people's models, thousands of times larger: the two are not "
                "joined, because nothing measured lies between.",
                lambda: gap_figure(gap),
            ),
            Paragraph("Published gaps of mHC, for comparison:"),
            published_table(),
            Paragraph(SMALL),
        ]
    return blocks


def points_table(found: Mapping[str, Kind]) -> Table:
    """What was run and what it cost."""
    header = ["kind", "N", "D", "D / N", "C", "C / 6 N D", "loss", "seeds"]
    rows = []
    for name, kind in found.items():
        points = kind.collected.points
        for n, d, c, losses in zip(points.parameters, points.tokens, points.flops, points.losses):
            own = losses[np.isfinite(losses)]
            spread = f" ± {np.std(own, ddof=1):.4f}" if len(own) > 1 else ""
            loss = f"{formats.loss(own.mean())}{spread}"
            cells = [formats.count(n), formats.count(d), f"{d / n:.3g}", f"{c:.2e}", f"{c / (6 * n * d):.2f}", loss, str(len(own))]
            rows.append([name, *cells])
    return Table(header, rows)


def law_table(found: Mapping[str, Kind]) -> Table:
    """Coefficients with intervals; a kind whose runs do not determine them says what they lack."""
    rows = []
    for row, label in enumerate(COEFFICIENTS):
        cells = []
        for kind in found.values():
            if not isinstance(kind.fit, LawFit):
                cells.append(str(kind.fit) if row == 0 else formats.NONE)
                continue
            value = formats.significant(kind.fit.values()[row])
            cells.append(
                f"{value} [{_ends(np.array([kind.fit.values(law) for law in kind.fit.drawn])[:, row])}]" if kind.fit.drawn else value
            )
        rows.append([label, *cells])
    fits = [kind.fit for kind in found.values()]
    rows.append(["residuals of log L", *(f"{100 * fit.error:.2f} %" if isinstance(fit, LawFit) else formats.NONE for fit in fits)])
    rows.append(["FLOPs a token", *(_compute(fit) if isinstance(fit, LawFit) else formats.NONE for fit in fits)])
    return Table(["", *found], rows, words=True)


def isoflop_table(found: Mapping[str, Kind]) -> Table:
    """The lowest point of every profile."""
    rows = []
    for name, kind in found.items():
        for profile in kind.isoflop.profiles:
            if profile.optimum is None or profile.tokens is None or profile.lowest is None:
                why = "fewer than 3 sizes" if profile.parabola is None else "outside the sizes"
                rows.append([name, f"{profile.flops:.2e}", why, *[formats.NONE] * 3])
                continue
            n, d = profile.optimum, profile.tokens
            rows.append([name, f"{profile.flops:.2e}", formats.count(n), formats.count(d), f"{d / n:.1f}", formats.loss(profile.lowest)])
    return Table(["kind", "C", "best N", "its D", "D / N", "loss there"], rows)


def gap_table(found: Mapping[str, Gap]) -> Table:
    """Every pair of runs."""
    rows = []
    for kind, gap in found.items():
        for name, d, c, gaps_of in zip(gap.names, gap.points.tokens, gap.points.flops, gap.points.losses):
            own = gaps_of[np.isfinite(gaps_of)]
            rows.append([kind, name, formats.count(d), f"{c:.2e}", formats.gap(own.mean()), ", ".join(formats.gap(g) for g in own)])
    return Table(["kind", "size", "D", "C of the plain residual", "gap", "of each seed"], rows)


def published_table() -> Table:
    """GAPS."""
    rows = []
    for g in GAPS:
        error = "" if g.error is None else f" ± {g.error:.4f}"
        compute = f"{g.flops:.1e} ({'6 N D' if g.config is None else 'counted'})"
        rows.append([g.source, g.model, f"{g.tokens:.3g}", compute, f"{g.gap:+.4f}{error}", g.status])
    return Table(["source", "model", "tokens", "FLOPs", "gap (nats)", "status"], rows, words=True)


def _absent(found: Mapping[str, Kind]) -> list[Block]:
    missing = [name for kind in found.values() for name in kind.collected.missing]
    broken = [name for kind in found.values() for name in kind.collected.not_finite]
    notes: list[Block] = []
    if missing:
        notes.append(Paragraph(f"The fits are of the runs that have finished; {len(missing)} are missing (listed at the end).", note=True))
    if broken:
        names = ", ".join(f"`{name}`" for name in broken)
        notes.append(Paragraph(f"Left out of the fits, because their loss is not finite: {names}.", note=True))
    return notes


def _optima(found: Mapping[str, Kind]) -> list[Block]:
    lines = []
    for name, kind in found.items():
        own = kind.isoflop
        if own.parameters is None or own.tokens is None:
            lines.append(f"`{name}`: fewer than two budgets have their lowest point within the sizes, so it has no exponents.")
            continue
        ends = "" if own.drawn is None else f" [{_ends(own.drawn[:, 0])}]"
        other = "" if own.drawn is None else f" [{_ends(own.drawn[:, 1])}]"
        lines.append(
            f"`{name}`: the best size grows as C^{own.parameters.exponent:.2f}{ends}, its tokens as C^{own.tokens.exponent:.2f}{other}. "
            "(Hoffmann et al., arXiv 2203.15556, by the same method: 0.49 and 0.51.)"
        )
    return [Items(lines)] if lines else []


def _line(item: tuple[str, Gap]) -> str:
    kind, gap = item
    value = formats.gap(float(gap.points.mean.mean()))
    mean = f"`{kind}`: the mean gap over {len(gap.points.mean)} points ({gap.points.runs} pairs of runs) is {value} nats"
    if gap.line is None:
        return f"{mean}; too few pairs for a trend over compute."
    slope = f"its slope {gap.line[0]:+.4f} nats a decade of compute"
    if gap.drawn is None:
        return f"{mean}, {slope}; too few pairs for intervals."
    low, high = interval(gap.drawn)
    clear = low[0] > 0 or high[0] < 0
    verdict = "" if clear else ": no trend that the noise does not explain"
    return f"{mean} [{low[1]:+.4f}, {high[1]:+.4f}], {slope} [{low[0]:+.4f}, {high[0]:+.4f}]{verdict}."


def _at_equal_compute(found: Mapping[str, Kind]) -> list[str]:
    """Losses of the fitted laws where each spends the same FLOPs best: here mHC pays for its own."""
    base = found.get("residual")
    if base is None or not isinstance(base.fit, LawFit):
        return []
    flops = float(np.exp(np.log(base.collected.points.flops).mean()))
    lines = []
    for name, kind in found.items():
        if kind is base or not isinstance(kind.fit, LawFit):
            continue
        text = f"`{name}` at equal compute ({flops:.1e} FLOPs, each at the best size of its law)"
        if not (_reached(kind, flops) and _reached(base, flops)):
            lines.append(f"{text}: not compared, as a best size lies outside the sizes.")
            continue
        text += f": {formats.gap(_best(kind.fit, kind.fit.law, flops) - _best(base.fit, base.fit.law, flops))} nats"
        if _same_points(kind, base):
            pairs = zip(kind.fit.drawn, base.fit.drawn)
            low, high = interval(np.array([_best(kind.fit, own, flops) - _best(base.fit, plain, flops) for own, plain in pairs]))
            text += f" [{low:+.4f}, {high:+.4f}]"
        lines.append(f"{text}.")
    return lines


def _best(fit: LawFit, law: Law, flops: float) -> float:
    """Loss where a law, the fitted or a resampled one, spends the FLOPs best."""
    return float(optimum(law, flops, fit.compute).loss)


def _reached(kind: Kind, flops: float) -> bool:
    assert isinstance(kind.fit, LawFit)
    sizes = kind.collected.points.parameters
    return bool(sizes.min() <= optimum(kind.fit.law, flops, kind.fit.compute).parameters <= sizes.max())


def _same_points(kind: Kind, base: Kind) -> bool:
    """Whether the bootstraps of both drew the same points and seeds: they draw by the same numbers from points of the same shape."""
    if not (isinstance(kind.fit, LawFit) and isinstance(base.fit, LawFit) and kind.fit.drawn and base.fit.drawn):
        return False
    own, plain = kind.collected.points, base.collected.points
    return np.array_equal(own.tokens, plain.tokens) and np.array_equal(np.isnan(own.losses), np.isnan(plain.losses))


def _compute(fit: LawFit) -> str:
    return f"{fit.compute.k:.3g} N^{fit.compute.p:.3f} (rule of thumb: 6 N)"


def _ends(values: np.ndarray) -> str:
    low, high = interval(values)
    return f"{formats.significant(float(low))}, {formats.significant(float(high))}"


def _picture(stem: str, title: str, reading: str, draw) -> Picture:
    return Picture(f"figures/scaling_{stem}.png", title, reading, to_png(draw))
