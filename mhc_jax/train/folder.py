"""A run folder as seen from outside: whose it is, whether its run has finished. Needs no JAX."""

from pathlib import Path
from typing import Any

from mhc_jax.config import Config, difference, from_json
from mhc_jax.errors import UserError
from mhc_jax.files import read_json


def finished(config: Config, folder: Path) -> dict[str, Any] | None:
    """The summary of a finished run of this config in the folder; None where the run has not finished or not begun.

    Raises:
      UserError: the folder holds a run of another config, or a file in it is half-written.
    """
    path = folder / "summary.json"
    if (folder / "config.json").exists() or path.exists():
        check_same_config(saved_config(folder), config, str(folder))
    return read_json(path) if path.exists() else None


def saved_config(folder: Path) -> Config:
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
    """Raises UserError, naming the fields that differ, unless the two configs describe the same run."""
    if changed := difference(saved, wanted):
        lines = "".join(f"\n  {path}: {there!r} in the folder, {now!r} now" for path, (there, now) in changed.items())
        raise UserError(f"{what} holds a run with another config:{lines}\nGive another --out, or delete the folder.")
