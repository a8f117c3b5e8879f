"""Where a run's numbers go: JSON lines, TensorBoard events, one file of stability arrays an evaluation. Nothing is computed here."""

import contextlib
import io
import json
import math
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import numpy as np

from mhc_jax.errors import UserError
from mhc_jax.files import AnyPath, LineFile, is_remote, write_atomically
from mhc_jax.train.events import Events


class MetricsWriter:
    """Appends to RUN/metrics.jsonl, and on this machine to RUN/tensorboard. A context manager."""

    def __init__(self, folder: AnyPath, resume_step: int, *, writes: bool = True):
        """Continues after `resume_step`: lines of later steps, left by a run that was cut, are removed so that no curve doubles back.

        One of several processes writes; the others do nothing here.
        """
        self._writes = writes
        if not writes:
            return
        path = folder / "metrics.jsonl"
        kept = [json.dumps(line) for line in _lines_until(path, resume_step)]
        self._stability = folder / "stability"
        self._stability.mkdir(exist_ok=True)
        for file in self._stability.glob("*"):  # iterdir fails in a store, which has no empty folders
            half_written = file.suffix == ".tmp"
            if half_written or int(file.stem) > resume_step:
                file.unlink()
        self._lines = LineFile(path, kept)
        self._board = None if is_remote(folder) else Events(folder / "tensorboard", purge_step=resume_step + 1)

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """One line and one TensorBoard point a value."""
        if not self._writes:
            return
        self._lines.add(json.dumps({"kind": kind, "step": step, **{k: finite(v) for k, v in values.items()}}))
        if self._board is not None:
            for name, value in values.items():
                self._board.scalar(f"{kind}/{name}", value, step)

    def write_stability(self, step: int, arrays: dict[str, np.ndarray]) -> None:
        """RUN/stability/STEP.npz."""
        if not self._writes:
            return
        content = io.BytesIO()
        np.savez(content, allow_pickle=False, **arrays)
        write_atomically(self._stability / f"{step:08d}.npz", content.getvalue())

    def flush(self) -> None:
        """Returns when everything written is stored: a checkpoint must not be there before the lines that lead to it."""
        if not self._writes:
            return
        self._lines.flush()
        if self._board is not None:
            self._board.flush()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._writes:
            return
        with contextlib.ExitStack() as both:
            both.callback(self._lines.close)
            if self._board is not None:
                both.callback(self._board.close)


def losses_until(folder: AnyPath, step: int) -> list[float]:
    """Training losses of a run's steps up to this one; NaN where one was not finite."""
    lines = _lines_until(folder / "metrics.jsonl", step)
    return [math.nan if line["loss"] is None else line["loss"] for line in lines if line["kind"] == "train"]


def finite(value: float) -> float | None:
    """The number, or None where it is not finite: JSON has no NaN."""
    return value if math.isfinite(value) else None


def read_lines(path: AnyPath) -> list[dict[str, Any]]:
    """The complete lines of a JSON lines file; a last line that was cut off is left out.

    Raises:
      UserError: a line is not what was written.
    """
    lines = list(_readable_lines(path))
    if lines and lines[-1] is None:
        raise UserError(f"{path}, line {len(lines)} is damaged; delete the run's folder to run it again")
    return [line for line in lines if line is not None]


def _lines_until(path: AnyPath, step: int) -> list[dict[str, Any]]:
    """The lines of steps up to this one. Damage after them does no harm: what follows is written again.

    Raises:
      UserError: the file is damaged before its lines reach the step.
    """
    kept: list[dict[str, Any]] = []
    if step < 0:
        return kept
    for line in _readable_lines(path) if path.exists() else ():
        if line is None or line["step"] > step:
            break
        kept.append(line)
    if max((line["step"] for line in kept), default=-1) < step:
        raise UserError(
            f"{path} is missing or damaged: it ends before step {step}, which is to be resumed; delete the run's folder to begin again"
        )
    return kept


def _readable_lines(path: AnyPath) -> Iterator[dict[str, Any] | None]:
    """The complete lines, and None in the place of the first that is not what was written; nothing comes after it."""
    content = path.read_bytes()
    for line in content[: content.rfind(b"\n") + 1].splitlines():
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            values = None
        sound = isinstance(values, dict) and isinstance(values.get("step"), int) and {"kind", "loss"} <= values.keys()
        yield values if sound else None
        if not sound:
            return
