"""The folders under RUN/checkpoints: which are complete, which are kept, where damaged ones go. What is in them is checkpoint's part.

STEP             a complete checkpoint: a folder gets this name when everything in it has been written
unfinished-STEP  one that is being written, or whose writing was cut
damaged-STEP     one that could not be read, kept for whoever wants to know why; damaged-STEP-2 is the second of that step

An object store cannot rename a folder. There a checkpoint is written under its final name, and is complete when it holds about.json.
"""

import math
import os
import re
from collections.abc import Mapping

from etils import epath

from mhc_jax.files import is_remote

ABOUT = "about.json"  # written last

_STEP = "(0|[1-9][0-9]{0,17})"  # as this module writes it: not 03, not the digits of other scripts


def complete(folder: epath.Path) -> list[int]:
    """Steps of the complete checkpoints, rising. What is in them may be damaged all the same."""
    if not folder.exists():
        return []
    found = [path for path in folder.iterdir() if re.fullmatch(_STEP, path.name)]
    return sorted(int(path.name) for path in found if not is_remote(folder) or (path / ABOUT).exists())


def unfinished(folder: epath.Path, step: int) -> epath.Path:
    """Where a checkpoint is written."""
    return folder / (str(step) if is_remote(folder) else f"unfinished-{step}")


def complete_one(folder: epath.Path, step: int) -> None:
    """Gives a checkpoint its name, once everything in it has been stored for good."""
    if not is_remote(folder):
        unfinished(folder, step).rename(folder / str(step))
        parent = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)


def remove_unfinished(folder: epath.Path) -> list[int]:
    """Removes what a cut run was still writing, and returns its steps."""
    if not folder.exists():
        return []
    names = {str(step) for step in complete(folder)}
    removed = []
    for path in list(folder.iterdir()):
        match = re.fullmatch(f"(unfinished-)?{_STEP}", path.name)
        if match and path.name not in names:
            path.rmtree(missing_ok=True)
            removed.append(int(match[2]))
    return sorted(removed)


def move_aside(folder: epath.Path, step: int) -> epath.Path:
    """Renames a damaged checkpoint, so that the run can write this step again, and returns where it lies now."""
    target, number = folder / f"damaged-{step}", 1
    while target.exists():
        number += 1
        target = folder / f"damaged-{step}-{number}"
    if is_remote(folder):
        _copy(folder / str(step), target)
        (folder / str(step)).rmtree()
    else:
        (folder / str(step)).rename(target)
    return target


def _copy(source: epath.Path, target: epath.Path) -> None:
    for path in source.iterdir():
        if path.is_dir():
            _copy(path, target / path.name)
        else:
            path.copy(target / path.name)


def set_aside(folder: epath.Path) -> list[str]:
    """Names of the damaged checkpoints."""
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("damaged-")) if folder.exists() else []


def surplus(losses: Mapping[int, float | None], *, last: int, best: int, every: int) -> list[int]:
    """Steps that need not be kept: neither the newest, nor among the newest `last` regular ones, nor among the `best` of lowest loss.

    Args:
      losses: held-out loss of every checkpoint by its step; one without a finite loss is never among the best.
      last: newest regular ones to keep.
      best: best to keep.
      every: steps between regular checkpoints. Others were made because the run was asked to stop; they must not push out a regular one,
        which a run with a loss spike goes back to.
    """
    regular = [step for step in sorted(losses) if step % every == 0]
    newest = [*regular[-last:], *sorted(losses)[-1:]]
    measured = [(loss, step) for step, loss in losses.items() if loss is not None and math.isfinite(loss)]
    lowest = [step for _, step in sorted(measured)[:best]]
    return sorted(set(losses) - set(newest) - set(lowest))
