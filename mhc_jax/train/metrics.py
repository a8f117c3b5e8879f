"""Where a run's numbers go: JSON lines, TensorBoard events, one file of stability arrays an evaluation. Nothing is computed here."""

import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter

from mhc_jax.files import write_atomically


class MetricsWriter:
    """Appends to RUN/metrics.jsonl and RUN/tensorboard. A context manager."""

    def __init__(self, folder: Path, resume_step: int):
        """Continues after `resume_step`: lines of later steps, left by a run that was cut, are removed so that no curve doubles back."""
        self._path = folder / "metrics.jsonl"
        if self._path.exists():
            kept = [line for line in read_lines(self._path) if line["step"] <= resume_step]
            write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        self._stability = folder / "stability"
        self._stability.mkdir(exist_ok=True)
        for file in self._stability.glob("*.npz"):
            if int(file.stem) > resume_step:
                file.unlink()
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1, flush_secs=30)

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """One line and one TensorBoard point a value."""
        self._file.write(json.dumps({"kind": kind, "step": step, **{k: finite(v) for k, v in values.items()}}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)

    def write_stability(self, step: int, arrays: dict[str, np.ndarray]) -> None:
        """RUN/stability/STEP.npz."""
        target = self._stability / f"{step:08d}.npz"
        with target.with_suffix(".tmp").open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        os.replace(target.with_suffix(".tmp"), target)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        self._board.close()


def finite(value: float) -> float | None:
    """The number, or None where it is not finite: JSON has no NaN."""
    return value if math.isfinite(value) else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSON lines file; a last line that was cut off is left out."""
    text = path.read_text(encoding="utf-8")
    complete = text[: text.rfind("\n") + 1]
    return [json.loads(line) for line in complete.splitlines()]
