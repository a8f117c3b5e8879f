"""The report of the study of needles, drawn from what needle.json holds. Nothing is trained here."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from mhc_jax.experiments.document import Block, Code, Heading, Paragraph, Picture, Table
from mhc_jax.experiments.formats import percent
from mhc_jax.experiments.study import to_png
from mhc_jax.experiments.style import WIDTH

SMOOTHED = 20  # steps that a point of the loss curves is the mean of
LOOKS = {
    "dense": ("#6b6b6b", ()),
    "dense, trained on": ("#6b6b6b", (4, 1.5)),
    "sparse from scratch": ("#E69F00", ()),
    "warm-up of the indexer": ("#009E73", (1.5, 1.5)),
    "dense, warm-up, sparse": ("#0072B2", ()),
    "sparse, indexer never trained": ("#D55E00", ()),
}


def needle_blocks(found: Mapping[str, Any], command: str) -> list[Block]:
    """The report's content; pieces that are not there yet are left out and said to be."""
    about, done = found["about"], found["pieces"]
    task = about["task"]
    blocks: list[Block] = [
        Paragraph(
            f"Sequences of {task['length']} tokens hide {task['needles']} needles, each a key with a value, among filler, and ask for all "
            f"of them at the end. A sparse query attends to {about['top_k']} of up to {task['length']} keys. Guessing is right "
            f"{percent(1 / task['values'])} of the time."
        )
    ]
    missing = [name for name in LOOKS if name not in done]
    if missing:
        blocks.append(Paragraph(f"This report is partial; not trained yet: {', '.join(missing)}.", note=True))
    if done:
        picture = to_png(lambda: needle_figure(done, task))
        reading = (
            f"Left, the loss of answers over training, means of {SMOOTHED} steps; a piece that begins with another's parameters begins "
            "where that one ends. Right, the share of right answers by where the needle lies, 100 % being next to the questions."
        )
        blocks += [Heading("What came out"), accuracy_table(done), Picture("figures/needle.png", "Accuracy by depth", reading, picture)]
        blocks.append(depth_table(done, task))
    return [*blocks, Code(command)]


def accuracy_table(done: Mapping[str, Any]) -> Table:
    """A row a piece: what it began with, and how much of the answers are right; ± is the binomial standard error."""
    rows = []
    for name, own in done.items():
        error = (own["accuracy"] * (1 - own["accuracy"]) / own["answers"]) ** 0.5
        indexer = own["indexer_loss"][-1]
        cells = [own["begins"] or "–", f"{own['steps']}", f"{percent(own['accuracy'])} ± {100 * error:.1f}"]
        rows.append([name, *cells, "–" if indexer is None else f"{indexer:.3f}", f"{own['seconds']:.0f}"])
    return Table(["piece", "begins with", "steps", "right answers", "indexer's loss", "CPU seconds"], rows)


def depth_table(done: Mapping[str, Any], task: Mapping[str, int]) -> Table:
    """Right answers by depth, and how far a question looks back on average."""
    parts = len(next(iter(done.values()))["by_depth"])
    haystack = task["length"] - 2 * task["needles"]
    rows = []
    for part in range(parts):
        back = haystack + task["needles"] - 1 - (part + 0.5) * haystack / parts
        cells = [percent(own["by_depth"][part]) for own in done.values()]
        rows.append([f"{100 * part / parts:.0f} to {100 * (part + 1) / parts:.0f} %", f"{back:.0f}", *cells])
    return Table(["depth of the needle", "tokens back", *done], rows)


def needle_figure(done: Mapping[str, Any], task: Mapping[str, int]) -> Figure:
    """Loss over steps, and accuracy over depth."""
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    begins_at: dict[str, int] = {}
    for name, own in done.items():
        color, dashes = LOOKS[name]
        start = begins_at.get(own["begins"], 0)
        begins_at[name] = start + own["steps"]
        count = max(1, len(own["loss"]) // SMOOTHED)
        groups = np.array_split(np.asarray(own["loss"]), count)
        ends = start + np.cumsum([len(group) for group in groups])
        losses.plot(ends, [group.mean() for group in groups], color=color, dashes=dashes, label=name)
        depth = (np.arange(len(own["by_depth"])) + 0.5) / len(own["by_depth"])
        accuracies.plot(100 * depth, 100 * np.asarray(own["by_depth"]), color=color, dashes=dashes, marker="o", markersize=3.5)
    accuracies.axhline(100 / task["values"], color="black", linewidth=0.8)
    accuracies.text(1, 100 / task["values"] + 1, "guessing")
    accuracies.set(title="right answers", xlabel="depth of the needle in the haystack", xlim=(0, 100), ylim=(0, 102))
    accuracies.xaxis.set_major_formatter(PercentFormatter(decimals=0))
    accuracies.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    losses.set(title="loss of the answers (nats)", xlabel="step", ylim=(0, None))
    figure.legend(*losses.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure
