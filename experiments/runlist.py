"""The engine of every experiment: execute a list of runs in order and keep its report true after each one.

It decides what to skip, resume and refuse. How a run is trained is the business of the function it is handed.
"""

from collections.abc import Callable, Sequence
from typing import Any

from mhc_jax.config import Config
from mhc_jax.experiments.records import steps_done
from mhc_jax.experiments.report import write_report
from mhc_jax.experiments.results import Results, load_results
from mhc_jax.experiments.runs import Run, RunList, run_folder, save_runs
from mhc_jax.files import AnyPath
from mhc_jax.train.folder import finished

Say = Callable[[str], None]
Train = Callable[[Config, AnyPath], dict[str, Any]]

__all__ = ["Run", "RunList", "Train", "follow", "run_list", "run_some"]


def run_list(runs: RunList, folder: AnyPath, train: Train, *, say: Say = print) -> Results:
    """Trains what has not finished, in the order of the list, and rewrites results.json and the report after every run.

    Args:
      runs: the list; its order is the order of training.
      folder: where everything goes; runs live in `folder/runs/NAME`.
      train: trains one config into one folder and returns its summary (docs/results.md). Called again on a folder that holds an
        interrupted run of the same config, it must resume that run by itself.
      say: is told what happens, a line at a time.

    Raises:
      UserError: a run folder holds another config. Checked for all runs before the first is trained.
    """
    done = _done(runs.runs, folder)
    save_runs(runs, folder)
    write_report(folder, say)
    for number, run in enumerate(runs.runs, start=1):
        if run.name in done:
            say(f"{run.name}: finished before, skipped ({number} of {len(runs.runs)})")
            continue
        begun = steps_done(run_folder(folder, run)) > 0
        say(f"{run.name}: {'resumed' if begun else 'started'} ({number} of {len(runs.runs)})")
        loss = train(run.config, run_folder(folder, run))["loss"]
        say(f"{run.name}: held-out loss {'not finite' if loss is None else f'{loss:.4f}'}")
        write_report(folder, say)
    return load_results(folder)


def follow(runs: RunList, folder: AnyPath, train: Train) -> None:
    """What all processes but the first of several do beside its `run_list`: they train the same runs, and write nothing."""
    done = _done(runs.runs, folder)
    for run in runs.runs:
        if run.name not in done:
            train(run.config, run_folder(folder, run))


def run_some(runs: Sequence[Run], folder: AnyPath, train: Train, *, say: Say = print) -> None:
    """Trains some runs of a list and writes nothing but their own folders, so that many tasks may do so at once.

    Raises:
      UserError: as `run_list`, for these runs.
    """
    done = _done(runs, folder)
    for run in runs:
        if run.name in done:
            say(f"{run.name}: finished before, skipped")
            continue
        loss = train(run.config, run_folder(folder, run))["loss"]
        say(f"{run.name}: held-out loss {'not finite' if loss is None else f'{loss:.4f}'}")


def _done(runs: Sequence[Run], folder: AnyPath) -> set[str]:
    return {run.name for run in runs if finished(run.config, run_folder(folder, run)) is not None}
