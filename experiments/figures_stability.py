"""The figure of stability_at_depth: composite gains over the depth of models that were drawn and not trained."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from matplotlib.figure import Figure

from mhc_jax.experiments.results import Results
from mhc_jax.experiments.style import WIDTH, legend, line, line_styles, log_axis, whole_numbers


class Drawn(Protocol):
    """Gains [draws, L] of models that were drawn."""

    @property
    def forward(self) -> np.ndarray: ...

    @property
    def backward(self) -> np.ndarray: ...


def gains_figure(results: Results, drawn: Mapping[str, Drawn], quantiles: Sequence[float]) -> Figure:
    """Forward (left) and backward (right) composite gain over depth of each variant: the median, and a band between the outer quantiles."""
    styles = {name: style for name, style in line_styles(results).items() if name in drawn}
    figure = Figure(figsize=(WIDTH, 3.9), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    titles = {"forward": "Forward, sublayers 1 to l together", "backward": "Backward, sublayers l to last together"}
    values = []
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        for variant, style in styles.items():
            gains = getattr(drawn[variant], name)
            low, median, high = np.quantile(gains, quantiles, axis=0)
            sublayer = np.arange(1, gains.shape[1] + 1)
            axes.plot(sublayer, median, **line(style))
            axes.fill_between(sublayer, low, high, color=style.color, alpha=0.18, linewidth=0)
            values += [low, high]
        axes.set(title=title, xlabel="sublayer l")
        whole_numbers(axes)
    log_axis(panels[0], values, (0.8, 2.0))
    panels[0].set_ylabel("gain (1 = unchanged)")
    legend(figure, styles)
    return figure
