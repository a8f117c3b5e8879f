"""Run lists with a damaged file: the report says what is damaged, or holds the numbers of the files and no others."""

import contextlib
import csv
import functools
import io
import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fake_run import fake_train, tiny_config

from mhc_jax.cli import main
from mhc_jax.errors import UserError
from mhc_jax.experiments import progress
from mhc_jax.experiments.ablation import ablation
from mhc_jax.experiments.document import to_html, to_markdown
from mhc_jax.experiments.report import report_blocks
from mhc_jax.experiments.results import load_results, results_json
from mhc_jax.experiments.runs import RunList, load_runs, save_runs

from .harness import ACCEPTED, REFUSED, Check, Wrong, lasting_folder
from .mutate import damage_file, damage_json, write_odd_json

NAME, SHARE, SHORT = "saved files", 20, 25

T = TypeVar("T")

RUNS = ("residual-seed0", "mhc-seed0")


@functools.cache
def _intact() -> Path:
    """A finished list of two runs."""
    folder = lasting_folder()
    runs = ablation(tiny_config(steps=8, eval_every=4, layers=2), kinds=("residual", "mhc"))
    save_runs(runs, folder)
    for run in runs.runs:
        fake_train(run.config, folder / "runs" / run.name)
    if _check(folder, figures=False) != ACCEPTED:
        raise Wrong("the list is refused although nothing is damaged")
    return folder


def case(rng: random.Random, room: Path) -> tuple[str, Check]:
    folder = room / "list"
    shutil.copytree(_intact(), folder)
    run = folder / "runs" / rng.choice(RUNS)
    path = rng.choice(
        [folder / "runlist.json", run / "config.json", *2 * [run / "summary.json"], *2 * [run / "metrics.jsonl"], rng.choice(_arrays(run))]
    )
    if path.suffix == ".json" and rng.random() < 0.7:
        data, done = damage_json(rng, json.loads(path.read_text()), rng.choice([1, 1, 2, 5]))
        if path.name == "summary.json" and rng.random() < 0.6:
            data = json.loads(path.read_text())
            key = rng.choice([*3 * ["step_seconds"], "loss", "steps", "parameters", "memory_bytes", "gain_forward_max", "loss_spikes"])
            data[key] = rng.choice([0, 0.0, -1, 1e39, 10**30, "3", True, None, [1.0]])
            done = f"{key} = {data[key]!r}"
        write_odd_json(path, data)
        done = f"{path.name}: {done}"
    elif path.suffix == ".jsonl" and rng.random() < 0.7:
        rows, done = damage_json(rng, [json.loads(line) for line in path.read_text().splitlines()], rng.choice([1, 1, 2]))
        rows = rows if isinstance(rows, list) else [rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        done = f"{path.name}: {done}"
    else:
        done = damage_file(rng, path)
    figures = rng.random() < 0.05  # they are most of the cost
    return f"{done}{', with figures' if figures else ''}", lambda: _check(folder, figures)


def _arrays(run: Path) -> list[Path]:
    return sorted((run / "stability").iterdir())


def _check(folder: Path, figures: bool) -> str:
    if figures:
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            status = main(["report", str(folder)])
        if status == 2 and "mhc-jax: " in said.getvalue():
            return REFUSED
        if status != 0:
            raise Wrong(f"exit status {status}, and says {said.getvalue()[:200]!r}")
        content = json.loads((folder / "results.json").read_text())
        text = (folder / "report.md").read_text()
    else:
        runs = _or_refused(lambda: load_runs(folder))
        rows = progress.progress(runs, folder)
        try:
            results = _or_refused(lambda: load_results(folder))
        except UserError as error:
            if all(row.state != progress.UNUSABLE for row in rows):
                raise Wrong(f"the table shows nothing wrong with any run, and the report refuses: {error}") from error
            raise
        _compare_rows(folder, runs, rows)
        content = json.loads(json.dumps(results_json(results), allow_nan=False))
        blocks = report_blocks(results, [])
        text = to_markdown(blocks)
        to_html(results.runs.name, blocks).encode()
    _compare(folder, content, text)
    return ACCEPTED


def _or_refused(read: Callable[[], T]) -> T:
    """What the command line does with a file that cannot be opened, and names."""
    try:
        return read()
    except OSError as error:
        if error.filename is None:
            raise
        raise UserError(f"cannot use {error.filename}") from error


def _compare_rows(folder: Path, runs: RunList, rows: list[progress.Progress]) -> None:
    """Where the report is drawn, the table of runs has the losses of the summaries, and no others."""
    progress.table(runs, rows).encode()
    progress.write_csv(progress.columns(runs, rows), folder / "rows.csv")
    with (folder / "rows.csv").open(newline="") as file:
        cells = list(csv.DictReader(file))
    for row, cell in zip(rows, cells, strict=True):
        summary = folder / "runs" / row.run.name / "summary.json"
        loss = json.loads(summary.read_text())["loss"] if summary.exists() else ""
        if (row.state == progress.FINISHED) != summary.exists() or cell["run"] != row.run.name:
            raise Wrong(f"{row.run.name} counts as {row.state}")
        if (cell["loss"] or None) != (None if loss == "" else "nan" if loss is None else str(float(loss))):
            raise Wrong(f"{row.run.name}: its loss is {loss!r}, and {cell['loss']!r} in the table")


def _compare(folder: Path, content: dict[str, Any], text: str) -> None:
    """results.json holds what the summaries hold, its means are their means, and the report shows them."""
    for name, variant in content["variants"].items():
        summaries = {run: json.loads((folder / "runs" / run / "summary.json").read_text()) for run in variant["runs"]}
        for run, shown in variant["runs"].items():
            for key, value in shown.items():
                if key not in ("data", "platform") and not _same(value, summaries[run][key]):
                    raise Wrong(f"{run}: {key} is {value!r} in results.json, {summaries[run][key]!r} in summary.json")
            for key, value in shown["data"].items():
                if not _same(value, summaries[run]["data"][key]):
                    raise Wrong(f"{run}: data.{key} is {value!r} in results.json, {summaries[run]['data'][key]!r} in summary.json")
        for key in ("loss", "gain_forward_max", "parameters", "step_seconds"):
            values = [summary[key] for summary in summaries.values()]
            mean = None if None in values else sum(values) / len(values)
            found = variant[key]["mean"]
            if (mean is None) != (found is None) or (mean is not None and not math.isclose(mean, found, rel_tol=1e-9, abs_tol=1e-300)):
                raise Wrong(f"{name}: the mean of {key} is {found!r}, not {mean!r}")
        if any(summary["step_seconds"] <= 0 for summary in summaries.values()):
            raise Wrong(f"{name}: a step cannot take no time")
        loss = variant["loss"]["mean"]
        if (f"{loss:.4f}" if loss is not None else "not finite") not in text:
            raise Wrong(f"{name}: its loss {loss!r} is not in the report")
    missing = [run for run in content["missing"] if (folder / "runs" / run / "summary.json").exists()]
    if missing:
        raise Wrong(f"{', '.join(missing)} count as missing")


def _same(shown: Any, saved: Any) -> bool:
    if isinstance(saved, float) and not math.isfinite(saved):
        return shown is None
    if type(shown) is float and type(saved) is int:
        return shown == float(saved)
    return type(shown) is type(saved) and shown == saved
