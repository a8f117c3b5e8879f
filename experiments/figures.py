"""The catalogue of figures: what each is called, how it is read, when it applies. The drawing is in figures_steps, figures_depth,
figures_memory and figures_rates."""

import io
from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.figure import Figure

from mhc_jax.experiments.figures_depth import (
    bounded,
    bounded_gain_figure,
    column_error_figure,
    gain_over_depth_figure,
    matrices_figure,
    multi_stream,
    streams_figure,
    with_sinkhorn,
)
from mhc_jax.experiments.figures_memory import allocation_figure, gates_figure, has_gates, is_allocation
from mhc_jax.experiments.figures_rates import is_rate_grid, rates_figure
from mhc_jax.experiments.figures_steps import attention_logit_figure, gain_over_time_figure, gradient_figure, loss_figure
from mhc_jax.experiments.results import Results
from mhc_jax.experiments.style import styled


@dataclass(frozen=True)
class FigureSpec:
    """A figure of the report."""

    stem: str  # figures/STEM.png
    title: str
    reading: str  # two sentences: what is drawn, and what to look for
    draw: Callable[[Results], Figure]
    applies: Callable[[Results], bool]
    whole: bool = False  # draws the list as a whole, however many variants it has; the others draw each variant


FIGURES = (
    FigureSpec(
        "loss",
        "Held-out loss",
        "Held-out cross-entropy over training and, when the baseline has finished, its difference to the baseline of the same seed; a band "
        "spans the lowest and highest seed, and early gaps may leave the frame. A line that stays below zero at the end has learnt more "
        "from the same tokens, but without several seeds a few hundredths of a nat are noise.",
        loss_figure,
        lambda results: bool(results.records),
    ),
    FigureSpec(
        "gradient_norm",
        "Gradient norm",
        "The norm of the whole gradient before clipping: thin lines are single steps, thick ones a running mean. Look for spikes and for a "
        "level above the dashed line, where the clip shortens most steps.",
        gradient_figure,
        lambda results: bool(results.records),
    ),
    FigureSpec(
        "attention_logit",
        "Attention logits",
        "The largest attention logit of each training step. Logits that keep growing are how deep networks usually fail at a learning rate "
        "too high; QK-norm (`model.attention.qk_norm`) bounds them.",
        attention_logit_figure,
        lambda results: bool(results.records),
    ),
    FigureSpec(
        "gain_over_depth",
        "Gain over depth",
        "How much the residual path alone could amplify the streams at the last evaluation: the largest absolute row sum (forward) and "
        "column sum (backward) of H_res, of products of sublayers (top) and of single ones (bottom). A plain residual has gain 1 "
        "everywhere; a composite gain that grows over depth is the instability that doubly stochastic matrices rule out. A mapping is kept "
        "out of training where all streams are still equal, since it could change nothing there. (As Figures 3 and 7 of arXiv 2512.24880.)",
        gain_over_depth_figure,
        lambda results: bool(results.records),
    ),
    FigureSpec(
        "bounded_gain",
        "Backward gain of the bounded variants",
        "The backward curves above on a linear axis, for the variants that stay within the number of streams. Sinkhorn leaves columns "
        "nearly, not exactly, at one, and over many sublayers the rest adds up. (As Figure 7 of arXiv 2512.24880.)",
        bounded_gain_figure,
        lambda results: bool(bounded(results)) and len(bounded(results)) < len(multi_stream(results)),
    ),
    FigureSpec(
        "gain_over_time",
        "Largest composite gain over training",
        "The highest point of the composite curves above, at every evaluation. Exact row sums hold the forward gain at 1 and the backward "
        "gain below the number of streams; a line that keeps rising has no such bound.",
        gain_over_time_figure,
        lambda results: bool(results.records),
    ),
    FigureSpec(
        "matrices",
        "Residual mappings",
        "H_res at the last evaluation, averaged over tokens (first seed): row i says how stream i is made from the old ones; white is 0, "
        "and the deepest red or blue of each panel is its largest absolute entry (at least 1). A diagonal near 1 keeps streams apart, "
        "while a product with all entries near 1/n has mixed them completely. (As Figure 8 of arXiv 2512.24880.)",
        matrices_figure,
        lambda results: bool(multi_stream(results)),
    ),
    FigureSpec(
        "streams",
        "Streams",
        "Mean cosine between two different streams after every sublayer, and the size of every stream. A cosine near 1 "
        "means that the streams carry one signal several times; a single stream that outgrows the others means that the rest is unused.",
        streams_figure,
        lambda results: bool(multi_stream(results)),
    ),
    FigureSpec(
        "column_error",
        "Column error of H_res",
        "Rows are normalised last and are exact, so the columns carry what the finite number of Sinkhorn steps leaves undone: one point is "
        "one sublayer with its worst token (on the lower edge: 1e-9 or less), the grey curves are random normal logits in float64. Points "
        "at a logit standard deviation above about 2 may miss double stochasticity by a per cent or more; nearly diagonal logits converge "
        "more slowly than random ones of the same deviation.",
        column_error_figure,
        lambda results: bool(with_sinkhorn(results)),
    ),
    FigureSpec(
        "learning_rates",
        "Loss over the learning rate",
        "Held-out loss of every run over its learning rate; a line goes through the means over seeds, and a ring marks the best rate of "
        "each setting. A curve whose ring lies at its end has not shown its best rate, and curves that cross rank differently at different "
        "rates.",
        rates_figure,
        is_rate_grid,
        whole=True,
    ),
    FigureSpec(
        "allocation",
        "Loss over the share of experts",
        "Held-out loss of every run over rho, the share of the sparse parameters that are experts; the rest are Engram's tables. A dip "
        "below the dotted line means that some memory is worth its experts here; points of one rho lie as far apart as the seed alone "
        "can move them.",
        allocation_figure,
        is_allocation,
        whole=True,
    ),
    FigureSpec(
        "gates",
        "Gates over a text",
        "How far each token opens the gate of each layer's memory, at the beginning of the held-out text. Where gates open at the last "
        "token of a name or phrase, the memory has learnt it. (As section 6 of arXiv 2601.07372.)",
        gates_figure,
        has_gates,
    ),
)


def render(spec: FigureSpec, results: Results) -> bytes:
    """The figure as PNG."""
    buffer = io.BytesIO()
    with styled():
        spec.draw(results).savefig(buffer, format="png")
    return buffer.getvalue()
