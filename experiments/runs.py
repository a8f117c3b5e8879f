"""What a run and a list of runs are, the rules that make a list sound, and the file that remembers it. Executing one is runlist's part."""

import dataclasses
import json
import re
from dataclasses import dataclass
from typing import Any

from mhc_jax.config import Config, difference, from_json, to_json
from mhc_jax.errors import UserError
from mhc_jax.files import AnyPath, write_json
from mhc_jax.typecheck import shown


@dataclass(frozen=True)
class Run:
    """One training run of a list."""

    name: str  # its folder; letters, digits and any of . _ = + -
    variant: str  # runs of one variant differ in their seed alone
    config: Config


@dataclass(frozen=True)
class RunList:
    """A question, and the runs that answer it. Constructing it checks that the runs can be told apart.

    Raises:
      UserError: no runs; a name that is no folder name or is used twice; two equal configs; a variant whose runs differ in more than
        the seed; a baseline that is not a variant of the list.
    """

    name: str
    question: str
    runs: tuple[Run, ...]
    baseline: str | None  # variant that the others are compared with; None when there is nothing to compare with
    command: str = ""  # the command line that asked for the list, for the report

    def __post_init__(self):
        if not self.runs:
            raise UserError(f"the run list {self.name!r} holds no runs")
        _check_names(self.runs)
        _check_configs(self.runs)
        _check_variants(self.runs)
        if self.baseline is not None and self.baseline not in self.variants:
            raise UserError(f"the baseline {self.baseline!r} is not a variant of {self.name!r}; choose one of {', '.join(self.variants)}")

    @property
    def variants(self) -> tuple[str, ...]:
        """The variants in the order of their first run."""
        return tuple(dict.fromkeys(run.variant for run in self.runs))

    def first(self, variant: str) -> Run:
        """The first run of a variant."""
        return next(run for run in self.runs if run.variant == variant)


def run_folder(folder: AnyPath, run: Run) -> AnyPath:
    """Where a list that lives in `folder` keeps a run."""
    return folder / "runs" / run.name


def save_runs(runs: RunList, folder: AnyPath) -> None:
    """Writes FOLDER/runlist.json, so that a report can be written later from the folder alone."""
    entries = [{"name": run.name, "variant": run.variant, "config": to_json(run.config)} for run in runs.runs]
    header = {"name": runs.name, "question": runs.question, "baseline": runs.baseline, "command": runs.command}
    write_json(folder / "runlist.json", header | {"runs": entries})


def load_runs(folder: AnyPath) -> RunList:
    """Reads FOLDER/runlist.json.

    Raises:
      UserError: the file is missing, is not JSON, or was written by another version.
    """
    path = folder / "runlist.json"
    try:
        data = json.loads(path.read_bytes())
        for key in ("name", "question", "command"):
            _check_text(data[key])
        for entry in data["runs"]:
            _check_text(entry["variant"])
        runs = tuple(Run(entry["name"], entry["variant"], from_json(entry["config"])) for entry in data["runs"])
        return RunList(data["name"], data["question"], runs, data["baseline"], data["command"])
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} does not exist: {folder} is not the folder of a run list") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:  # not UTF-8, not JSON, or JSON of another shape
        raise UserError(f"{path} cannot be read: {error}") from error


def _check_text(value: Any) -> None:
    if not isinstance(value, str):
        raise UserError(f"{shown(value)} stands where text should")
    value.encode()  # half a surrogate pair, which JSON can spell, is a UnicodeError


def _check_names(runs: tuple[Run, ...]) -> None:
    seen = set()
    for run in runs:
        if not isinstance(run.name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._=+-]{0,199}", run.name):
            raise UserError(f"{shown(run.name)} cannot name a run folder; use letters, digits and any of . _ = + -")
        if run.name in seen:
            raise UserError(f"two runs are called {run.name!r}; they would share one folder, so rename one")
        seen.add(run.name)


def _check_configs(runs: tuple[Run, ...]) -> None:
    # The config's own name changes nothing that is trained, so two configs that differ in it alone are the same run twice.
    seen: dict[Config, str] = {}
    for run in runs:
        key = dataclasses.replace(run.config, name="compared")
        if key in seen:
            raise UserError(f"the runs {seen[key]!r} and {run.name!r} have the same config; remove one, or change a field of it")
        seen[key] = run.name


def _check_variants(runs: tuple[Run, ...]) -> None:
    first: dict[str, Run] = {}
    for run in runs:
        other = first.setdefault(run.variant, run)
        changed = set(difference(other.config, run.config)) - {"name", "train.seed"}
        if changed:
            raise UserError(
                f"the runs {other.name!r} and {run.name!r} are both of variant {run.variant!r}, but differ in "
                f"{', '.join(sorted(changed))}; runs of one variant may differ in train.seed only"
            )
