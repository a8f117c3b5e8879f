"""Where a run list comes from when a command names one: a Python file with a function `sweep()`, a name in lists, or a list's folder."""

import types
from collections.abc import Sequence
from pathlib import Path

from mhc_jax.errors import UserError
from mhc_jax.experiments.lists import RUN_LISTS
from mhc_jax.experiments.runs import Run, RunList, load_runs
from mhc_jax.files import AnyPath, to_path
from mhc_jax.typecheck import shown

LIST = "runlist.json"


def open_list(target: str, out: str | None = None) -> tuple[RunList, AnyPath]:
    """The list that `target` names, and the folder where it lives.

    Args:
      target: FILE.py with a function `sweep()` that returns a RunList, a name in RUN_LISTS, or the folder of a list.
      out: the folder, for a file or a name; None is runs/NAME. A folder's list lives where it is.

    Raises:
      UserError: `target` is none of the three, the file fails or makes no list, or `out` is given for a list that has a folder.
    """
    if not target.endswith(".py") and target not in RUN_LISTS:
        folder = to_path(target)
        if not names_list(target):
            raise UserError(
                f"there is no sweep {shown(target)}: it is neither a file that ends in .py, nor one of {', '.join(RUN_LISTS)}, nor a "
                f"folder that holds {LIST}"
            )
        if out is not None:
            raise UserError(f"{target} is the folder of a list; --out would be another one, so leave it away")
        return load_runs(folder), folder
    runs = RUN_LISTS[target]() if target in RUN_LISTS else read_file(Path(target))
    return runs, to_path(out) if out else Path("runs") / runs.name


def names_list(target: str) -> bool:
    """Whether `open_list` would look for a list there."""
    try:
        return target.endswith(".py") or target in RUN_LISTS or (to_path(target) / LIST).exists()
    except (OSError, UserError):  # a name too long for a file, a store that is not known
        return False


def read_file(path: Path) -> RunList:
    """Executes a Python file and returns what its function `sweep` does.

    Raises:
      UserError: the file is missing, fails, has no such function, or the function returns no RunList; the message names file and line.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    module = types.ModuleType("sweep_file")
    module.__file__ = str(path)
    try:
        # Not by an import, which would leave compiled code beside the file and might take it for the file's after a change.
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
        make = getattr(module, "sweep", None)
        runs = make() if isinstance(make, types.FunctionType) and make.__code__.co_filename == str(path) else None
    except UserError as error:
        raise UserError(f"{path}{_line(error, path)}: {error}") from error
    except (Exception, SystemExit) as error:
        raise UserError(f"{path}{_line(error, path)}: {type(error).__name__}: {error}") from error
    if runs is None:
        raise UserError(f"{path} has no function sweep() of its own that returns a RunList; docs/sweeps.md shows one")
    if not isinstance(runs, RunList):
        raise UserError(f"sweep() of {path} returns {shown(runs)}, not a RunList; end it with `return sweep(NAME, QUESTION, BASE, POINTS)`")
    return runs


def chosen(runs: RunList, words: Sequence[str]) -> tuple[Run, ...]:
    """The runs that `--only` names, by name or by number from 1, in the order of the list.

    Raises:
      UserError: a word names no run, or there are no words.
    """
    if not words:
        raise UserError(f"--only names no run of {runs.name}; give numbers from 1 to {len(runs.runs)}, or names")
    by_word = {str(number): run for number, run in enumerate(runs.runs, start=1)} | {run.name: run for run in runs.runs}
    for word in words:
        if word not in by_word:
            names = ", ".join(run.name for run in runs.runs[:6]) + (", ..." if len(runs.runs) > 6 else "")
            raise UserError(f"--only: there is no run {shown(word)} in {runs.name}; give 1 to {len(runs.runs)}, or a name: {names}")
    wanted = {by_word[word].name for word in words}
    return tuple(run for run in runs.runs if run.name in wanted)


def check_unchanged(runs: Sequence[Run], folder: AnyPath) -> None:
    """Where the folder holds a list, these runs must be in it as they are: tasks of one sweep must not come from two forms of its file.

    Raises:
      UserError: a run is not in the folder's list, or has another config there.
    """
    if not (folder / LIST).exists():
        return
    saved = {run.name: run for run in load_runs(folder).runs}
    for run in runs:
        if run != saved.get(run.name):
            what = "has another config" if run.name in saved else "is not"
            raise UserError(
                f"{run.name} {what} in {folder / LIST}, which an earlier form of this sweep has written; give another --out, or the same "
                "sweep without --only to begin with the new form"
            )


def _line(error: BaseException, path: Path) -> str:
    """The last line of the file that the error passed through, as a message names it."""
    if isinstance(error, SyntaxError):
        return f", line {error.lineno}" if error.lineno else ""
    lines = []
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return f", line {lines[-1]}" if lines else ""
