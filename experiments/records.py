"""A finished run folder, read into typed arrays. Files and keys are those of docs/results.md; nothing is computed here."""

import dataclasses
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mhc_jax.config import Config
from mhc_jax.errors import UserError
from mhc_jax.experiments.runs import Run
from mhc_jax.files import read_json
from mhc_jax.train.folder import saved_config

T = TypeVar("T")


@dataclass(frozen=True)
class DataSummary:
    """Where a run's tokens came from."""

    fingerprint: str  # of the corpus
    source: str
    train_tokens: int
    heldout_tokens: int
    unique_tokens: int  # of the training split that the run used
    epochs: float  # passes over the training split; above 1 tokens were repeated
    vocab_size: int
    tokenizer: str  # fingerprint


@dataclass(frozen=True)
class Summary:
    """summary.json. Losses in nats, times in seconds; a value that was not finite is NaN."""

    name: str
    residual: str
    seed: int
    steps: int
    tokens: int
    loss: float
    best_loss: float
    best_step: int
    unigram_entropy: float
    parameters: int
    active_parameters: int
    connection_parameters: int
    tokens_per_second: float
    step_seconds: float
    memory_bytes: int
    first_step_seconds: float
    compile_seconds: float
    gain_forward: float
    gain_backward: float
    gain_forward_max: float
    gain_backward_max: float
    grad_norm: float
    clip_rate: float
    loss_spikes: int
    data: DataSummary
    platform: dict[str, Any]


@dataclass(frozen=True, eq=False)
class TrainMetrics:
    """The training lines of metrics.jsonl; every array is [steps], float64."""

    step: np.ndarray
    loss: np.ndarray
    balance_loss: np.ndarray
    grad_norm: np.ndarray
    clipped: np.ndarray
    learning_rate: np.ndarray
    max_attention_logit: np.ndarray
    expert_load_max: np.ndarray
    tokens: np.ndarray
    seconds: np.ndarray


@dataclass(frozen=True, eq=False)
class EvalMetrics:
    """The evaluation lines of metrics.jsonl; every array is [evaluations], float64."""

    step: np.ndarray
    loss: np.ndarray
    max_attention_logit: np.ndarray
    gain_forward: np.ndarray
    gain_backward: np.ndarray
    row_error: np.ndarray
    column_error: np.ndarray


@dataclass(frozen=True, eq=False)
class Stability:
    """The files of stability/, stacked over evaluations E; L sublayers, n streams."""

    step: np.ndarray  # [E]
    gain_forward_single: np.ndarray  # [E, L]
    gain_backward_single: np.ndarray  # [E, L]
    gain_forward_composite: np.ndarray  # [E, L], of the product of sublayers 1..l
    gain_backward_composite: np.ndarray  # [E, L], of the product of sublayers l..L
    row_error: np.ndarray  # [E, L]
    column_error: np.ndarray  # [E, L]
    distance_identity: np.ndarray  # [E, L]
    distance_uniform: np.ndarray  # [E, L]
    logit_std: np.ndarray  # [E, L]
    res: np.ndarray  # [E, L, n, n]
    res_composite: np.ndarray  # [E, L, n, n], product of sublayers 1..l
    pre: np.ndarray  # [E, L, n]
    post: np.ndarray  # [E, L, n]
    stream_norm: np.ndarray  # [E, L + 1, n]
    stream_cosine: np.ndarray  # [E, L + 1]
    max_attention_logit: np.ndarray  # [E, L / 2]
    learnable: np.ndarray  # [E, L, 3], for pre, post, res


@dataclass(frozen=True, eq=False)
class RunRecord:
    """One finished run."""

    name: str
    variant: str
    config: Config
    summary: Summary
    train: TrainMetrics
    eval: EvalMetrics
    stability: Stability

    @property
    def seed(self) -> int:
        """The seed that pairs this run with the baseline's."""
        return self.config.train.seed

    @property
    def streams(self) -> int:
        """Number of residual streams n; 1 for the plain residual."""
        return self.stability.res.shape[-1]


def read_run(run: Run, folder: Path) -> RunRecord:
    """Reads the finished `run` from its folder.

    Raises:
      UserError: a file is missing, half-written or lacks a key of docs/results.md; the message names the file.
    """
    rows = _read_rows(folder / "metrics.jsonl")
    return RunRecord(
        name=run.name,
        variant=run.variant,
        config=saved_config(folder),
        summary=_read_summary(folder / "summary.json"),
        train=_columns(TrainMetrics, rows, "train", folder / "metrics.jsonl"),
        eval=_columns(EvalMetrics, rows, "eval", folder / "metrics.jsonl"),
        stability=_read_stability(folder / "stability"),
    )


def steps_done(folder: Path) -> int:
    """Last optimizer step in an unfinished run's metrics.jsonl; 0 without one. A cut last line is no error here."""
    path = folder / "metrics.jsonl"
    steps = [0]
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row.get("kind") == "train":
            steps.append(row["step"])
    return max(steps)


def _read_summary(path: Path) -> Summary:
    data = read_json(path)
    summary = _from_keys(Summary, data, path)
    return dataclasses.replace(summary, data=_from_keys(DataSummary, data["data"], path))


def _from_keys(cls: type[T], data: dict[str, Any], path: Path) -> T:
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    _require(names, data, path)
    # JSON has no NaN, so a value that was not finite arrives as null.
    return cls(**{name: float("nan") if data[name] is None else data[name] for name in names})


def _require(names: list[str], data: Any, path: Path) -> None:
    missing = [name for name in names if name not in data]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; it is half-written or of another version")


def _read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        raise UserError(f"{path} is missing; delete its folder to run it again")
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number} is half-written ({error}); delete its folder to run it again") from error
    return rows


def _columns(cls: type[T], rows: list[dict[str, Any]], kind: str, path: Path) -> T:
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    chosen = [row for row in rows if row.get("kind") == kind]
    if not chosen:
        raise UserError(f"{path} holds no line of kind {kind!r}")
    for row in chosen:
        _require(names, row, path)
    columns = {name: np.array([row[name] for row in chosen], np.float64) for name in names}
    if np.any(np.diff(columns["step"]) <= 0):
        raise UserError(f"{path}: the steps of kind {kind!r} do not rise; a step was written twice")
    return cls(**columns)


def _read_stability(folder: Path) -> Stability:
    paths = sorted(folder.glob("*.npz"))
    if not paths:
        raise UserError(f"{folder} holds no stability arrays; delete the run's folder to run it again")
    names = [f.name for f in dataclasses.fields(Stability) if f.name != "step"]
    evaluations = [_read_arrays(path, names) for path in paths]
    arrays = {name: np.stack([evaluation[name] for evaluation in evaluations]) for name in names}
    return Stability(step=np.array([int(path.stem) for path in paths]), **arrays)


def _read_arrays(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    try:
        # Opened here, because np.load leaves a file that it cannot make sense of open.
        with path.open("rb") as stream, np.load(stream) as file:
            arrays = {name: np.asarray(file[name]) for name in file.files}
    except (zipfile.BadZipFile, OSError, EOFError, ValueError) as error:
        raise UserError(f"{path} is half-written ({error}); delete its folder to run it again") from error
    _require(names, arrays, path)
    return {name: arrays[name].astype(np.float64) for name in names}
