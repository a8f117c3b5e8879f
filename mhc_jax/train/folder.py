"""A run folder as seen from outside: whose it is, whether its run has finished. Needs no JAX."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from etils import epath

from mhc_jax.config import Config, difference, from_json
from mhc_jax.errors import UserError
from mhc_jax.files import AnyPath, disk_is_full, read_json
from mhc_jax.train import steps

WHERE_IT_RUNS = ("mesh.", "model.engram.tables.placement", "model.engram.tables.hot_rows")  # beginnings of field paths


def finished(config: Config, folder: AnyPath) -> dict[str, Any] | None:
    """The summary of a finished run of this config in the folder; None where the run has not finished or not begun.

    Raises:
      UserError: the folder holds a run of another config, or a file in it is half-written.
    """
    path = folder / "summary.json"
    if (folder / "config.json").exists() or path.exists():
        check_same_config(saved_config(folder), config, str(folder))
    return read_json(path) if path.exists() else None


def saved_config(folder: AnyPath) -> Config:
    """The config of the run in the folder.

    Raises:
      UserError: its file is missing, half-written or of another version.
    """
    path = folder / "config.json"
    try:
        return from_json(read_json(path))
    except UserError as error:
        raise UserError(f"{path} cannot be used: {error}") from error


def check_same_config(saved: Config, wanted: Config, what: str) -> None:
    """Raises UserError, naming the fields that differ, unless the two configs describe the same run.

    Where it runs is no part of what a run is: it may go on with its tables elsewhere, and on a mesh of another shape.
    """
    changed = {path: values for path, values in difference(saved, wanted).items() if not path.startswith(WHERE_IT_RUNS)}
    if changed:
        lines = "".join(f"\n  {path}: {there!r} in the folder, {now!r} now" for path, (there, now) in changed.items())
        raise UserError(f"{what} holds a run with another config:{lines}\nGive another --out, or delete the folder.")


@contextmanager
def full_disk_is_told(folder: AnyPath) -> Iterator[None]:
    """Around what writes into a run folder: where the disk is full, a UserError says which checkpoint is safe and how to go on."""
    try:
        yield
    except Exception as error:
        if not disk_is_full(error):
            raise
        found = steps.complete(epath.Path(folder) / "checkpoints")
        safe = f"the last good checkpoint is that of step {found[-1]}" if found else "there is no checkpoint yet"
        raise UserError(
            f"disk full (or over quota) while writing to {folder}; {safe}. Free some space and give the same command: it goes on from there"
        ) from error
