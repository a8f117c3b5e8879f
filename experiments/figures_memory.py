"""Figures and tables of runs with Engram: loss over the share of experts, use of the tables, gates over a text."""

from collections.abc import Iterable

import numpy as np
from matplotlib.figure import Figure

from mhc_jax.config import Config
from mhc_jax.experiments.document import Block, Heading, Items, Paragraph, Table
from mhc_jax.experiments.formats import percent
from mhc_jax.experiments.memory_records import TableUse
from mhc_jax.experiments.results import Results, Variant
from mhc_jax.experiments.style import WIDTH
from mhc_jax.nn.count import count_parameters, idle_experts

TOKENS = 64  # of the text that the gates are drawn over
PER_ROW = 16  # tokens of one row of that figure

# Published answers to the question of the allocation sweep.
PUBLISHED = (
    "arXiv 2601.07372, section 3 (Engram): at 5.7B and 9.9B parameters the loss is lowest with 75 to 80 % of the sparse parameters in "
    "experts; at 10B it falls from 1.7248 (all experts) to 1.7109.",
    "arXiv 2608.30320 (Qwen3.8-Flash-Next): at a fixed budget the loss is lowest with 25 % in n-gram memory (1.202 to 1.197), but neither "
    "perplexity on other text nor downstream tasks gain over experts alone.",
    "deepseek-ai/Engram, issue 20 (a reader's 1.3B dense model): lower training loss, no gain in evaluations at equal parameters.",
)


def expert_share(config: Config) -> float:
    """rho: routed experts' share of the parameters that a token does not use."""
    m = config.model
    idle = idle_experts(m)
    return idle / (idle + count_parameters(m).table)


def with_memory(results: Results) -> list[Variant]:
    """The variants with Engram."""
    return [variant for variant in results.variants if variant.records[0].config.model.engram is not None]


def is_allocation(results: Results) -> bool:
    """Whether the list sweeps the share of experts, and some of it is there to be seen."""
    return len({round(expert_share(variant.records[0].config), 3) for variant in with_memory(results)}) > 1


def allocation_figure(results: Results) -> Figure:
    """Held-out loss over rho: a point a run, a line through the means; runs without memory at 1."""
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    axes = figure.subplots()
    baseline, memory = results.baseline, with_memory(results)
    curve = sorted([*memory, *([baseline] if baseline else [])], key=lambda v: expert_share(v.records[0].config))
    shares = [expert_share(v.records[0].config) for v in curve]
    axes.plot(shares, [np.mean([r.summary.loss for r in v.records]) for v in curve], color="#0072B2", label="mean over seeds")
    for variant, share in zip(curve, shares):
        axes.plot([share] * len(variant.records), [r.summary.loss for r in variant.records], "o", color="#0072B2", markersize=5)
    markers = iter("sD^v")
    for variant in results.variants:
        if variant in curve:
            continue
        losses = [r.summary.loss for r in variant.records]
        shares_of = [expert_share(r.config) for r in variant.records]
        axes.plot(shares_of, losses, next(markers), color="#D55E00", markersize=6, label=variant.name)
    if baseline:
        level = float(np.mean([r.summary.loss for r in baseline.records]))
        axes.axhline(level, color="#888888", linewidth=1.2, linestyle=":", label=f"mean of {baseline.name}")
    axes.set(xlabel="rho, share of experts in the sparse parameters", ylabel="held-out loss (nats per token)")
    axes.legend()
    return figure


def has_gates(results: Results) -> bool:
    """Whether a run with a memory has been studied."""
    return any(r.memory is not None for r in results.records)


def gates_figure(results: Results) -> Figure:
    """The gates of the first studied run over the beginning of the held-out text: a strip a layer, the tokens under it."""
    record = next(r for r in results.records if r.memory is not None)
    study = record.memory
    assert study is not None and record.config.model.engram is not None
    gates = np.array(study.gates)[:, :TOKENS]
    rows = -(-gates.shape[1] // PER_ROW)
    figure = Figure(figsize=(WIDTH, 1.15 * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, 1, squeeze=False)[:, 0]
    low, high = float(gates.min()), float(gates.max())
    for row, axes in enumerate(panels):
        part = gates[:, row * PER_ROW : (row + 1) * PER_ROW]
        image = axes.imshow(part, vmin=low, vmax=high, cmap="Blues", aspect="auto")
        axes.set_xlim(-0.5, PER_ROW - 0.5)
        labels = [token_label(token) for token in study.tokens[row * PER_ROW : row * PER_ROW + part.shape[1]]]
        axes.set_xticks(range(len(labels)), labels, fontsize=8, family="monospace")
        axes.set_yticks(range(len(part)), [f"layer {layer}" for layer in record.config.model.engram.layer_ids], fontsize=8)
        axes.grid(False)
    figure.colorbar(image, ax=list(panels), label="gate, mean over streams")
    figure.suptitle(f"{record.name}", x=0.01, ha="left", fontsize=10)
    return figure


def memory_blocks(results: Results) -> list[Block]:
    """The section on memory; nothing where no run has one."""
    memory = with_memory(results)
    if not memory:
        return []
    rows = []
    for variant in results.variants:
        record = variant.records[0]
        count = count_parameters(record.config.model)
        by_order: dict[int, list[TableUse]] = {}
        for use in record.memory.tables if record.memory else ():
            by_order.setdefault(use.order, []).append(use)
        touched = "; ".join(f"order {order}: {percent(_mean(u.touched for u in uses))}" for order, uses in by_order.items())
        colliding = "; ".join(
            f"order {order}: {percent(_mean(u.colliding for u in uses))} of {uses[0].ngrams:,}" for order, uses in by_order.items()
        )
        share = f"{expert_share(record.config):.3f}"
        rows.append(
            [variant.name, share, f"{count.total:,}", f"{count.active:,}", f"{count.table:,}", touched or "none", colliding or "none"]
        )
    header = ["variant", "rho", "parameters", "active", "in tables", "rows that training read", "n-grams that share a row"]
    blocks: list[Block] = [
        Heading("Memory"),
        Table(header, rows, words=True),
        Paragraph(
            "rho is the experts' share of the sparse parameters, those that a token does not use. Rows and n-grams are counted over the "
            "training tokens of the first seed, as means over layers and heads."
        ),
    ]
    if is_allocation(results):
        blocks += [Paragraph("What others found, at other scales:"), Items(list(PUBLISHED))]
    return blocks


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def token_label(token: str) -> str:
    """A token as a short label of a figure: white space made visible, dollars kept from matplotlib's mathematics."""
    text = token.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥").replace("$", r"\$")
    return text if len(text) <= 9 else f"{text[:8]}…"
