"""Does this fit give back published coefficients? `mhc-jax study scaling_published`.

The data are the 245 points that Besiroglu et al. (arXiv 2404.10102) read off Figure 4 of Hoffmann et al. (arXiv 2203.15556), from their
repository epoch-research/analyzing-chinchilla: parameters, FLOPs and loss, five digits of each, in chinchilla_figure_4.csv. D is C / 6 N,
as theirs; the five highest losses are left out, as they do.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from mhc_jax.experiments import formats
from mhc_jax.experiments.document import Block, Code, Heading, Paragraph, Picture, Table
from mhc_jax.experiments.scaling_law import Compute, Law, exponents, fit_law, huber_loss, optimum
from mhc_jax.experiments.scaling_points import Points, bootstrap_law, interval
from mhc_jax.experiments.scaling_published import BESIROGLU, BESIROGLU_ERRORS, HOFFMANN
from mhc_jax.experiments.study import Say, to_png, write_study
from mhc_jax.experiments.style import WIDTH
from mhc_jax.files import AnyPath

NAME = "scaling_published"
DATA = Path(__file__).with_name("chinchilla_figure_4.csv")
LEFT_OUT = 5  # points of highest loss
RESAMPLES = 1000
# a of N_opt ~ C^a, 6 N D; half of the published 80 % interval is 1.28 standard errors.
PUBLISHED_EXPONENT, PUBLISHED_EXPONENT_ERROR = 0.513, 0.02


@dataclass(frozen=True, eq=False)
class Refit:
    """The law of the published points."""

    points: Points
    law: Law
    drawn: tuple[Law, ...]

    def errors(self) -> dict[str, float]:
        """Bootstrap standard errors by coefficient."""
        return {name: float(np.std([getattr(law, name) for law in self.drawn], ddof=1)) for name in BESIROGLU_ERRORS}


def published_points() -> Points:
    """The 240 points that are fitted, a seed each."""
    with DATA.open(newline="") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    parameters, flops, losses = (np.array([float(row[key]) for row in rows]) for key in ("parameters", "flops", "loss"))
    kept = np.sort(np.argsort(losses)[:-LEFT_OUT])
    return Points(parameters[kept], flops[kept] / (6 * parameters[kept]), flops[kept], losses[kept, None])


def refit(resamples: int = RESAMPLES) -> Refit:
    """Fit and bootstrap."""
    points = published_points()
    law = fit_law(points.parameters, points.tokens, points.mean)
    return Refit(points, law, bootstrap_law(points, law, resamples=resamples))


def run(folder: AnyPath, command: str, say: Say) -> None:
    """Fits and writes the report; about half a minute."""
    found = refit()
    picture = Picture(
        "figures/tokens_per_parameter.png",
        "Tokens per parameter at the optimum",
        "What each law says is best at a budget of 6 N D FLOPs, with the 80 % interval of the refit. The points reach as far as the solid "
        "lines; beyond, dashed, nothing was measured.",
        to_png(lambda: ratio_figure(found)),
    )
    table = comparison(found)
    for row in (table.header, *table.rows):
        say(" | ".join(row))
    write_study(
        folder, "A published scaling law, fitted again", [*_blocks(found, table), picture, Heading("To run it again"), Code(command)], say
    )


def comparison(found: Refit) -> Table:
    """Here, published, and the distance in published standard errors."""
    errors, rows = found.errors(), []
    for name, published_error in BESIROGLU_ERRORS.items():
        here, there = getattr(found.law, name), getattr(BESIROGLU, name)
        distance = f"{(here - there) / published_error:+.2f}"
        rows.append(
            [name, f"{here:.5g} ± {errors[name]:.2g}", f"{there:g} ± {published_error:g}", distance, f"{getattr(HOFFMANN, name):g}"]
        )
    a = np.array([exponents(law, Compute())[0] for law in found.drawn])
    own = exponents(found.law, Compute())[0]
    distance = f"{(own - PUBLISHED_EXPONENT) / PUBLISHED_EXPONENT_ERROR:+.2f}"
    published = f"{PUBLISHED_EXPONENT:g} ± {PUBLISHED_EXPONENT_ERROR:g}"
    rows.append(["N_opt ~ C^", f"{own:.4g} ± {np.std(a, ddof=1):.2g}", published, distance, f"{exponents(HOFFMANN, Compute())[0]:.3f}"])
    return Table(["", "fitted here", "arXiv 2404.10102", "apart, in its standard errors", "arXiv 2203.15556"], rows)


def ratio_figure(found: Refit) -> Figure:
    """D / N at the optimum over compute."""
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    axes = figure.subplots()
    low, high = found.points.flops.min(), found.points.flops.max()
    beyond = np.geomspace(high, 1e3 * high, 40)
    inside = np.geomspace(low, high, 60)
    both = np.concatenate([inside, beyond])
    curves = np.array([_ratio(law, both) for law in found.drawn])
    axes.fill_between(both, *interval(curves, 0.8), color="#0072B2", alpha=0.18, linewidth=0)
    for law, color, label in ((found.law, "#0072B2", "fitted here"), (HOFFMANN, "#6b6b6b", "arXiv 2203.15556, approach 3")):
        axes.plot(inside, _ratio(law, inside), color=color, label=label)
        axes.plot(beyond, _ratio(law, beyond), color=color, dashes=(4, 2))
    axes.axhline(20, color="#888888", linewidth=1.2, linestyle=":", label="20 tokens a parameter")
    axes.set(xscale="log", yscale="log", xlabel="FLOPs C = 6 N D", ylabel="tokens per parameter at the optimum")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend()
    return figure


def _ratio(law: Law, flops: np.ndarray) -> np.ndarray:
    best = optimum(law, flops, Compute())
    return best.tokens / best.parameters


def _blocks(found: Refit, table: Table) -> list[Block]:
    own, published, original = (
        formats.significant(huber_loss(law, found.points.parameters, found.points.tokens, found.points.mean))
        for law in (found.law, BESIROGLU, HOFFMANN)
    )
    return [
        Paragraph(
            "L(N, D) = E + A / N^alpha + B / D^beta, fitted to the points that Besiroglu et al. (arXiv 2404.10102) read off Figure 4 of "
            f"Hoffmann et al. (arXiv 2203.15556): {len(found.points.mean)} of them, the {LEFT_OUT} highest losses left out as they do. "
            f"± is a bootstrap's standard error, here over {len(found.drawn)} resamples."
        ),
        table,
        Paragraph(
            f"The objective (Huber loss of log L, in units of delta squared) is {own} here, {published} at the published coefficients as "
            f"printed, {original} at those of Hoffmann et al. A and B are far less certain than the loss: a change of either is made up "
            "for by its exponent."
        ),
    ]
