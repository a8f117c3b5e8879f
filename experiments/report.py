"""The report of a run list: report.md with figures/*.png, and report.html that holds everything in one file.

The numbers come from results, the sentences from findings, the tables from tables, the pictures from figures; this puts them in order.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import mhc_jax
from mhc_jax.config import to_text
from mhc_jax.experiments import formats, tables
from mhc_jax.experiments.document import Block, Code, Heading, Items, Paragraph, Picture, Table, to_html, to_markdown
from mhc_jax.experiments.figures import FIGURES, render
from mhc_jax.experiments.figures_memory import memory_blocks
from mhc_jax.experiments.findings import findings, warnings
from mhc_jax.experiments.published import SOURCE
from mhc_jax.experiments.rates import rate_blocks
from mhc_jax.experiments.results import MOST_SHOWN, Results, load_results, lowest, results_json
from mhc_jax.experiments.scaling_report import scaling_blocks
from mhc_jax.experiments.scaling_study import is_scaling
from mhc_jax.files import AnyPath, write_atomically, write_json


def write_report(folder: AnyPath, say: Callable[[str], None] = print) -> None:
    """Rewrites results.json, figures/*.png, report.md and report.html from the run folders in `folder`.

    Raises:
      UserError: as `load_results`.
    """
    results = load_results(folder)
    write_json(folder / "results.json", results_json(results))
    drawn = lowest(results)
    # Of a study over scale with its dozens of variants, figures that draw each of them cannot be read.
    specs = () if is_scaling(results) else FIGURES
    pictures = [
        Picture(f"figures/{spec.stem}.png", spec.title, spec.reading, render(spec, own))
        for spec in specs
        if spec.applies(own := results if spec.whole else drawn)
    ]
    blocks = report_blocks(results, pictures)
    for block in blocks:
        if isinstance(block, Picture):
            write_atomically(folder / block.path, block.png)
    write_atomically(folder / "report.md", to_markdown(blocks))
    write_atomically(folder / "report.html", to_html(results.runs.name, blocks))
    say(f"report: {folder / 'report.html'} ({len(results.records)} of {len(results.runs.runs)} runs)")


def report_blocks(results: Results, pictures: Iterable[Picture]) -> list[Block]:
    """The report's content, in order."""
    return [
        Heading(results.runs.name, level=1),
        Paragraph(results.runs.question),
        *_progress(results),
        *(scaling_blocks(results) if is_scaling(results) else []),
        *_numbers(results),
        *rate_blocks(results),
        Heading("What was run"),
        *_what_was_run(results),
        *_figures(pictures),
        *memory_blocks(results),
        *_published(results),
        *_missing(results),
        *_reproduce(results),
    ]


def _progress(results: Results) -> list[Block]:
    if not results.missing:
        return []
    done, total = len(results.records), len(results.runs.runs)
    return [Paragraph(f"This report is partial: {done} of {total} runs have finished. The others are listed below.", note=True)]


def _numbers(results: Results) -> list[Block]:
    if not results.variants:
        return []
    blocks: list[Block] = [Heading("Findings"), *(Paragraph(text, note=True) for text in warnings(results)), Items(findings(results))]
    gap = f" A gap is the difference to `{results.runs.baseline}` with the same seed." if results.runs.baseline else ""
    spread = " ± is the standard deviation over seeds." if any(len(variant.records) > 1 for variant in results.variants) else ""
    if lowest(results) is not results:
        which = f"the {MOST_SHOWN} variants with the lowest loss{' and the baseline' if results.runs.baseline else ''}"
        blocks.append(Paragraph(f"Findings and figures that go variant by variant are of {which}; the tables hold all."))
    return [
        *blocks,
        Heading("Numbers"),
        Heading("Loss", level=3),
        tables.loss_table(results),
        Paragraph(
            f"Held-out next-token cross-entropy in nats.{gap}{spread} The unigram entropy is the best that a model without context reaches."
        ),
        Heading("Stability", level=3),
        tables.stability_table(results),
        Paragraph(
            "Gains are the largest composite gains over depth, at the last evaluation and at any. The gradient norm is the mean over the "
            "last tenth of the steps, before clipping; the clip rate is the share of clipped steps."
        ),
        Heading("Cost", level=3),
        tables.cost_table(results),
        Paragraph("Speed is the median step without compilation and evaluation. Memory is the compiler's peak for the training step."),
    ]


def _what_was_run(results: Results) -> list[Block]:
    blocks: list[Block] = []
    differences = tables.config_table(results)
    if differences:
        blocks += [Paragraph("The variants differ in these fields of the config, and in nothing else:"), differences]
    records = results.records
    if not records:
        return blocks
    data = [record.summary.data for record in records]
    facts = {
        "steps": _distinct(f"{record.summary.steps:,}" for record in records),
        "tokens trained on": _distinct(f"{record.summary.tokens:,}" for record in records),
        "seeds": _distinct(str(record.seed) for record in records),
        "data": _distinct(d.source for d in data),
        "data fingerprint": _distinct(d.fingerprint for d in data),
        "unique training tokens": _distinct(f"{d.unique_tokens:,} of {d.train_tokens:,}" for d in data),
        "repeated": _distinct(_repetition(d.epochs) for d in data),
        "held-out tokens": _distinct(f"{d.heldout_tokens:,}" for d in data),
        "vocabulary": _distinct(f"{d.vocab_size:,}" for d in data),
        "tokenizer fingerprint": _distinct(d.tokenizer for d in data),
        **{
            key.replace("_", " "): _distinct(str(record.summary.platform.get(key)) for record in records) for key in _platform_keys(records)
        },
        "report written by": f"mhc_jax {mhc_jax.__version__}",
    }
    return [*blocks, Table(["what", "value"], list(facts.items()), words=True)]


def _figures(pictures: Iterable[Picture]) -> list[Block]:
    blocks: list[Block] = []
    for picture in pictures:
        blocks += [Heading(picture.title, level=3), picture]
    return [Heading("Figures"), *blocks] if blocks else []


def _published(results: Results) -> list[Block]:
    table = tables.published_table(results)
    if table is None or is_scaling(results):
        return []
    summaries = [record.summary for record in results.records]
    here = f"{_range([s.parameters for s in summaries])} parameters and {_range([s.tokens for s in summaries])} tokens"
    scale = f" The runs here have {here}." if summaries else ""
    return [
        Heading("Beside the paper, at another scale"),
        Paragraph(
            f"Source: {SOURCE}.{scale} The columns answer one question at different sizes; neither confirms nor contradicts the other."
        ),
        table,
    ]


def _missing(results: Results) -> list[Block]:
    if not results.missing:
        return [Heading("Missing runs"), Paragraph("None.")]
    lines = [
        f"`{run.name}`: " + (f"stopped after step {run.steps_done} of {run.steps}" if run.steps_done else "not started")
        for run in results.missing
    ]
    return [Heading("Missing runs"), Items(lines), Paragraph("The same command continues where the list stopped.")]


def _reproduce(results: Results) -> list[Block]:
    first = results.runs.runs[0]
    command: list[Block] = [Paragraph("Command:"), Code(results.runs.command)] if results.runs.command else []
    return [
        Heading("To run it again"),
        *command,
        Paragraph(f"Config of `{first.name}`; the others differ from it as the table above says, and in the seed:"),
        Code(to_text(first.config)),
    ]


def _platform_keys(records: Iterable[Any]) -> list[str]:
    return list(dict.fromkeys(key for record in records for key in record.summary.platform))


def _repetition(epochs: float) -> str:
    return f"yes, {formats.significant(epochs)} passes over the training tokens" if epochs > 1 else "no, no token was seen twice"


def _range(values: Sequence[int]) -> str:
    low, high = min(values, default=0), max(values, default=0)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _distinct(values: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(values))
