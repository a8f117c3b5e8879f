"""How far every run of a list is, as a table for the terminal and as columns for CSV and Parquet. Works at any time, beside running tasks.

Runs that are unfinished or cannot be read have empty cells. Statistics over seeds and the report are the part of results and report.
"""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mhc_jax.config import difference, fields
from mhc_jax.data.formats import optional
from mhc_jax.errors import UserError
from mhc_jax.experiments import formats
from mhc_jax.experiments.records import Summary, read_run, steps_done
from mhc_jax.experiments.results import AVERAGED
from mhc_jax.experiments.runs import Run, RunList, run_folder
from mhc_jax.files import AnyPath, write_atomically
from mhc_jax.train.folder import finished

FINISHED, UNFINISHED, NOT_STARTED, UNUSABLE = "finished", "unfinished", "not started", "unusable"


@dataclass(frozen=True)
class Progress:
    """What has become of one run."""

    run: Run
    state: str  # one of the four above
    steps_done: int | None  # None where the run is unusable
    summary: Summary | None  # of a finished run
    gap: float | None  # loss minus that of the baseline's run with the same seed, nats; None where one of the two has not finished
    problem: str = ""  # why the run is unusable


def progress(runs: RunList, folder: AnyPath) -> list[Progress]:
    """Looks at every run of the list in its folder; what is wrong with a run is told in its `problem` and never raised."""
    found = [_look(run, run_folder(folder, run)) for run in runs.runs]
    losses = {p.run.config.train.seed: p.summary.loss for p in found if p.summary and p.run.variant == runs.baseline}
    return [_with_gap(p, losses.get(p.run.config.train.seed)) for p in found]


def changed_fields(runs: RunList) -> list[str]:
    """Paths of the config fields that are not the same in all runs, the name left out."""
    first = runs.runs[0].config
    return list(dict.fromkeys(path for run in runs.runs for path in difference(first, run.config) if path != "name"))


def table(runs: RunList, rows: Sequence[Progress]) -> str:
    """A line a run, a count of the states, and what is wrong with those that are unusable."""
    paths = changed_fields(runs)
    last = [path.rpartition(".")[2] for path in paths]
    titles = [short if last.count(short) == 1 else path for path, short in zip(paths, last, strict=True)]
    header = ["run", "variant", *titles, "state", "steps", "held-out loss", *([f"gap to {runs.baseline}"] if runs.baseline else [])]
    lines = [header]
    for row in rows:
        values = dict(fields(row.run.config))
        steps = "" if row.steps_done is None else f"{row.steps_done}/{row.run.config.train.steps}"
        gap = [_number(row.gap, formats.gap)] if runs.baseline else []
        loss = _number(row.summary.loss if row.summary else None, formats.loss)
        own = [_shown(values.get(path)) for path in paths]
        lines.append([row.run.name, _shown(row.run.variant), *own, row.state, steps, loss, *gap])
    states = [row.state for row in rows]
    counts = ", ".join(f"{states.count(s)} {s}" for s in (FINISHED, UNFINISHED, NOT_STARTED, UNUSABLE) if s in states)
    problems = [f"{row.run.name} is unusable: {row.problem}" for row in rows if row.problem]
    return "\n".join([*_aligned(lines), f"{len(rows)} runs: {counts}", *problems])


def columns(runs: RunList, rows: Sequence[Progress]) -> dict[str, list[Any]]:
    """One value a run under each name: what the run is, its changed fields by path, how far it is, and its summary's numbers.

    None where there is no value, NaN where it was not finite. A field is a column of booleans, of integers, of floats, or of text, which is
    JSON for tuples and for fields that are not the same kind of value in all runs.
    """
    configs = [dict(fields(row.run.config)) for row in rows]
    summaries = [row.summary for row in rows]
    result: dict[str, list[Any]] = {"run": [row.run.name for row in rows], "variant": [row.run.variant for row in rows]}
    result |= {path: _one_kind([config.get(path) for config in configs]) for path in changed_fields(runs)}
    result |= {
        "state": [row.state for row in rows],
        "steps_done": [row.steps_done for row in rows],
        "steps": [row.run.config.train.steps for row in rows],
        "loss": [summary and float(summary.loss) for summary in summaries],
        "gap": [row.gap for row in rows],
    }
    return result | {name: [summary and float(getattr(summary, name)) for summary in summaries] for name in AVERAGED if name != "loss"}


def write_csv(table: dict[str, list[Any]], path: AnyPath) -> None:
    """Comma-separated values with a header; no value is an empty cell, one that was not finite is nan."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table)
    writer.writerows(zip(*table.values(), strict=True))
    write_atomically(path, text.getvalue())


def write_parquet(table: dict[str, list[Any]], path: AnyPath) -> None:
    """The same as Parquet, where no value is null.

    Raises:
      UserError: pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise optional("pyarrow", f"writing {path}") from None
    numbers = {"steps_done": pa.int64(), "steps": pa.int64(), "gap": pa.float64()} | {name: pa.float64() for name in AVERAGED}
    arrays = {name: pa.array(values, numbers.get(name)) for name, values in table.items()}
    buffer = io.BytesIO()
    pq.write_table(pa.table(arrays), buffer)
    write_atomically(path, buffer.getvalue())


def _look(run: Run, folder: AnyPath) -> Progress:
    try:
        summary = read_run(run, folder).summary if finished(run.config, folder) is not None else None
        done = run.config.train.steps if summary else steps_done(folder)
        if done > run.config.train.steps:
            raise UserError(f"{folder / 'metrics.jsonl'} holds steps beyond the last one, {run.config.train.steps}; delete its folder")
    except (UserError, OSError) as error:
        return Progress(run, UNUSABLE, None, None, None, str(error))
    state = FINISHED if summary else UNFINISHED if done else NOT_STARTED
    return Progress(run, state, done, summary, None)


def _with_gap(row: Progress, baseline: float | None) -> Progress:
    if row.summary is None or baseline is None:
        return row
    return Progress(row.run, row.state, row.steps_done, row.summary, row.summary.loss - baseline)


def _one_kind(values: list[Any]) -> list[Any]:
    kinds = {type(value) for value in values if value is not None}
    if kinds == {str}:  # half a surrogate pair, which a config may hold, is no text that a file can
        return [None if value is None else value.encode(errors="backslashreplace").decode() for value in values]
    if kinds == {int, float}:
        return [None if value is None else float(value) for value in values]
    if len(kinds) <= 1 and kinds <= {bool, int, float}:
        return values
    return [None if value is None else json.dumps(value) for value in values]


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str) and value.isprintable():
        text = value
    else:
        text = f"{value:g}" if isinstance(value, float) else ascii(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _number(value: float | None, form: Any) -> str:
    return "" if value is None else form(value) if math.isfinite(value) else formats.NOT_FINITE


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
