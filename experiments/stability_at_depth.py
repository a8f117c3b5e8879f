"""Does mHC scale in depth? Trained mappings, drawn again for a deeper model. `mhc-jax study stability_at_depth --source LIST`.

The H_res that a run ended with, one a sublayer, are a pool; a model of any depth is made of draws from it, and its composite gains are
those of the products, over many draws. What that assumes:

- sublayers are independent of each other and alike at every depth: draws are uniform over the pool, with replacement;
- the mean of H_res over tokens, which is what runs keep, stands for the H_res of each token;
- a deeper model would train to the same mappings.

How far the first two hold is shown at the run's own depth, where the gains were measured; the third is held against deeper runs of the
same list. Sublayers whose H_res was kept out of training are left out of the pool.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from mhc_jax.config import difference
from mhc_jax.configs import get
from mhc_jax.errors import UserError
from mhc_jax.experiments.document import Block, Code, Heading, Items, Paragraph, Picture, Table
from mhc_jax.experiments.figures_stability import gains_figure
from mhc_jax.experiments.formats import significant
from mhc_jax.experiments.records import RunRecord
from mhc_jax.experiments.results import Results, Variant, load_results
from mhc_jax.experiments.study import Say, to_png, write_study
from mhc_jax.files import AnyPath

NAME = "stability_at_depth"
DRAWS = 2000
QUANTILES = (0.05, 0.5, 0.95)
RES = 2  # column of `learnable` that speaks of H_res
PUBLISHED = "At 27B parameters, 60 sublayers, the paper reports about 3000 for HC and about 1.6 for mHC (arXiv 2512.24880)."


@dataclass(frozen=True, eq=False)
class Gains:
    """Composite gains of drawn models, [draws, L] each: of the product of sublayers 1..l, and of that of sublayers l..L."""

    forward: np.ndarray
    backward: np.ndarray
    distance_uniform: np.ndarray  # [draws], Frobenius norm of the whole product less that of equal weights

    @property
    def largest(self) -> tuple[np.ndarray, np.ndarray]:
        """Largest forward and backward gain over depth, [draws] each."""
        return self.forward.max(axis=1), self.backward.max(axis=1)


def gains_of(res: np.ndarray) -> Gains:
    """Gains of models whose H_res are given, [draws, L, n, n], row i saying how stream i is made."""
    draws, depth, n, _ = res.shape
    forward, backward = np.empty((draws, depth)), np.empty((draws, depth))
    up = down = np.broadcast_to(np.eye(n), (draws, n, n))
    for first, last in zip(range(depth), reversed(range(depth)), strict=True):
        up, down = res[:, first] @ up, down @ res[:, last]
        forward[:, first] = np.abs(up.sum(axis=2)).max(axis=1)
        backward[:, last] = np.abs(down.sum(axis=1)).max(axis=1)
    return Gains(forward, backward, np.linalg.norm(up - 1 / n, axis=(1, 2)))


def resampled(pool: np.ndarray, depth: int, draws: int = DRAWS, seed: int = 0) -> Gains:
    """Gains of `draws` models of `depth` sublayers, each sublayer's H_res drawn from the pool [M, n, n]."""
    return gains_of(pool[np.random.default_rng(seed).integers(len(pool), size=(draws, depth))])


def pool_of(records: Sequence[RunRecord]) -> np.ndarray:
    """The last H_res [M, n, n] of all sublayers that trained one."""
    return np.concatenate([r.stability.res[-1][r.stability.learnable[-1, :, RES] != 0] for r in records])


def depths(own: int) -> dict[int, str]:
    """Sublayers that are looked at, with the models that have them."""
    models = {"27b": "the mHC paper's 27B", "v3_671b": "DeepSeek-V3", "moe_1t": "`moe_1t`"}
    found: dict[int, list[str]] = {own: ["as trained"]}
    for name, words in models.items():
        found.setdefault(2 * get(name).model.num_layers, []).append(words)
    found.setdefault(2 * max(found), []).append("twice that")
    return {depth: ", ".join(words) for depth, words in sorted(found.items())}


def run(folder: AnyPath, command: str, say: Say, source: AnyPath) -> None:
    """Writes the report of the runs of the list in `source`.

    Raises:
      UserError: `source` is no folder of a run list, or none of its finished runs has several streams.
    """
    results = load_results(source)
    variants = [variant for variant in results.variants if variant.records[0].streams > 1]
    if not variants:
        raise UserError(f"{source} holds no finished run with several streams; finish `mhc-jax ablate {results.runs.name}` first")
    found = [*_own_depth(variants), *_trained_deeper(variants), *_deeper(results, variants)]
    blocks = [*_introduction(source), *found, Heading("To run it again"), Code(command)]
    write_study(folder, "Composite gains of deeper models, from trained mappings", blocks, say)


def _introduction(source: AnyPath) -> list[Block]:
    return [
        Paragraph(
            f"A simulation from the mappings that the runs in `{source}` ended with, and no training of anything deeper. {DRAWS:,} models "
            "are drawn for each depth; a gain is the largest absolute row sum (forward) or column sum (backward) of a product of H_res. "
            + PUBLISHED
        ),
        Heading("What is assumed"),
        Items(
            [
                "Sublayers are independent and alike at every depth: H_res is drawn from all sublayers that trained one, with replacement.",
                "The mean of H_res over tokens stands for every token's.",
                "A deeper model would train to the same mappings.",
            ]
        ),
    ]


def _own_depth(variants: Sequence[Variant]) -> list[Block]:
    rows = []
    for variant in variants:
        record = variant.records[0]
        depth = record.stability.res.shape[1]
        in_order, drawn = gains_of(record.stability.res[-1][None]), resampled(pool_of(variant.records), depth)
        for name, kept in (("forward", record.stability.gain_forward_composite), ("backward", record.stability.gain_backward_composite)):
            values = np.quantile(getattr(drawn, name).max(axis=1), QUANTILES)
            numbers = [kept[-1].max(), getattr(in_order, name).max(), *values]
            rows.append([f"{variant.name}, {depth} sublayers, {name}", *map(significant, numbers)])
    return [
        Heading("At the depth that was trained"),
        Table(["largest composite gain", "measured, token by token", "mean H_res, in their order", "drawn: 5 %", "median", "95 %"], rows),
        Paragraph(
            "The second column against the first shows what the mean over tokens hides; the drawn ones against the second, what the order "
            "of sublayers and their likeness do. The first seed stands in the first two columns, all seeds in the draws."
        ),
    ]


def _trained_deeper(variants: Sequence[Variant]) -> list[Block]:
    rows = []
    for shallow, deep in permutations(variants, 2):
        ours, theirs = shallow.records[0], deep.records[0]
        changed = set(difference(ours.config, theirs.config)) - {"name"}
        depth = theirs.stability.res.shape[1]
        if changed == {"model.num_layers"} and depth > ours.stability.res.shape[1]:
            drawn = resampled(pool_of(shallow.records), depth).largest
            measured = (theirs.stability.gain_forward_composite[-1].max(), theirs.stability.gain_backward_composite[-1].max())
            cells = [cell for values, own in zip(drawn, measured, strict=True) for cell in (_quantiles(values), significant(own))]
            rows.append([f"{shallow.name}, drawn for {depth} sublayers", *cells])
    if not rows:
        return []
    header = ["mappings of", "largest forward gain, drawn", "measured in the deeper run", "backward, drawn", "measured"]
    text = "Runs that differ in depth alone. What separates the columns is the third assumption: deeper models train to other mappings."
    return [Heading("Held against deeper runs"), Table(header, rows), Paragraph(text)]


def _deeper(results: Results, variants: Sequence[Variant]) -> list[Block]:
    rows, drawn = [], {}
    for variant in variants:
        pool, own = pool_of(variant.records), variant.records[0].stability.res.shape[1]
        for depth, who in depths(own).items():
            gains = resampled(pool, depth)
            cells = [_quantiles(values) for values in gains.largest]
            growth = np.median(gains.largest[0]) ** (1 / depth)
            rows.append(
                [f"{variant.name}: {depth} ({who})", *cells, f"{growth:.3f}", significant(float(np.median(gains.distance_uniform)))]
            )
            if depth == 2 * get("moe_1t").model.num_layers:
                drawn[variant.name] = gains
    picture = Picture(
        "figures/gains.png",
        "Composite gains of drawn models",
        "Median and 5 to 95 % of the drawn models, each point over the draws. On this axis a straight line is exponential growth.",
        to_png(lambda: gains_figure(results, drawn, QUANTILES)),
    )
    header = [
        "variant: sublayers",
        "largest forward gain: median (5 to 95 %)",
        "largest backward gain",
        "growth a sublayer",
        "distance from equal weights",
    ]
    return [
        Heading("Deeper"),
        Table(header, rows),
        picture,
        Paragraph(
            "The last column is the other side of a bounded gain: a product of doubly stochastic matrices tends to equal weights, at which "
            "all streams are the same mean of what the first sublayers wrote (0; the identity stands at the root of n - 1)."
        ),
    ]


def _quantiles(values: np.ndarray) -> str:
    low, median, high = np.quantile(values, QUANTILES)
    return f"{significant(median)} ({significant(low)} to {significant(high)})"
