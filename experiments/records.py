"""A finished run folder, read into typed arrays. Files and keys are those of docs/results.md; nothing is computed here."""

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from mhc_jax.config import Config
from mhc_jax.errors import UserError
from mhc_jax.experiments.memory_records import MemoryStudy, load_study
from mhc_jax.experiments.runs import Run
from mhc_jax.files import AnyPath, read_json
from mhc_jax.train.folder import saved_config
from mhc_jax.typecheck import LARGEST_FLOAT, shown

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
    memory_bytes: float  # NaN where the compiler does not tell
    first_step_seconds: float
    compile_seconds: float
    gain_forward: float
    gain_backward: float
    gain_forward_max: float
    gain_backward_max: float
    grad_norm: float
    clip_rate: float
    loss_spikes: int
    skipped_steps: int
    rollbacks: int
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
    skipped: np.ndarray
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
    res_composite_rest: np.ndarray  # [E, L, n, n], product of sublayers l..L
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
    memory: MemoryStudy | None = None  # with Engram, where the run has been studied

    @property
    def seed(self) -> int:
        """The seed that pairs this run with the baseline's."""
        return self.config.train.seed

    @property
    def streams(self) -> int:
        """Number of residual streams n; 1 for the plain residual."""
        return self.stability.res.shape[-1]


def read_run(run: Run, folder: AnyPath) -> RunRecord:
    """Reads the finished `run` from its folder.

    Raises:
      UserError: a file is missing or half-written, lacks a key of docs/results.md or holds something else under it; the message names it.
    """
    rows = _read_rows(folder / "metrics.jsonl")
    config = saved_config(folder)
    return RunRecord(
        name=run.name,
        variant=run.variant,
        config=config,
        summary=_read_summary(folder / "summary.json"),
        train=_columns(TrainMetrics, rows, "train", folder / "metrics.jsonl"),
        eval=_columns(EvalMetrics, rows, "eval", folder / "metrics.jsonl"),
        stability=_read_stability(folder / "stability", config),
        memory=load_study(folder),
    )


def steps_done(folder: AnyPath) -> int:
    """Last optimizer step in an unfinished run's metrics.jsonl; 0 without one. Lines that cannot be read are no error here."""
    path = folder / "metrics.jsonl"
    steps = [0]
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and row.get("kind") == "train" and type(row.get("step")) is int:
            steps.append(row["step"])
    return max(steps)


def _read_summary(path: AnyPath) -> Summary:
    data = read_json(path)
    summary = _from_keys(Summary, data, path)
    if not summary.step_seconds > 0:
        raise _damaged(path, "step_seconds is not positive")
    return dataclasses.replace(summary, data=_from_keys(DataSummary, data["data"], path))


def _from_keys(cls: type[T], data: Any, path: AnyPath) -> T:
    kinds = {f.name: f.type for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    _require(kinds, data, path)
    return cls(**{name: _value(data[name], kind, name, path) for name, kind in kinds.items()})


def _value(value: Any, kind: Any, name: str, path: AnyPath) -> Any:
    """A value as its annotation says. JSON has no NaN, so a float that was not finite arrives as null."""
    if kind is float:
        if value is None:
            return math.nan
        if type(value) in (int, float) and abs(value) <= LARGEST_FLOAT:
            return float(value)
    elif kind is int:
        if type(value) is int and abs(value) < 2**63:
            return value
    elif kind is str:
        if type(value) is str and _is_unicode(value):
            return value
    elif isinstance(value, dict):  # data, platform
        return value
    raise _damaged(path, f"{name} is {shown(value)}")


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _damaged(path: AnyPath, what: object) -> UserError:
    return UserError(f"{path} is half-written or damaged ({what}); delete its folder to run it again")


def _require(names: Iterable[str], data: Any, path: AnyPath) -> None:
    if not isinstance(data, dict):
        raise _damaged(path, f"{shown(data)} stands where names and values should")
    missing = [name for name in names if name not in data]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; it is half-written or of another version")


def _read_rows(path: AnyPath) -> list[dict[str, Any]]:
    if not path.exists():
        raise UserError(f"{path} is missing; delete its folder to run it again")
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number} is half-written ({error}); delete its folder to run it again") from error
        _require(("kind", "step"), rows[-1], path)
        _value(rows[-1]["step"], int, "step", path)
    return rows


def _columns(cls: type[T], rows: list[dict[str, Any]], kind: str, path: AnyPath) -> T:
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    chosen = [row for row in rows if row["kind"] == kind]
    if not chosen:
        raise UserError(f"{path} holds no line of kind {kind!r}")
    for row in chosen:
        _require(names, row, path)
    columns = {name: np.array([_value(row[name], float, name, path) for row in chosen]) for name in names}
    if np.any(np.diff(columns["step"]) <= 0):
        raise UserError(f"{path}: the steps of kind {kind!r} do not rise; a step was written twice")
    return cls(**columns)


def _read_stability(folder: AnyPath, config: Config) -> Stability:
    paths = sorted(path for path in folder.glob("*.npz") if path.stem.isdecimal())
    if not paths:
        raise UserError(f"{folder} holds no stability arrays; delete the run's folder to run it again")
    shapes = _stability_shapes(config)
    evaluations = [_read_arrays(path, shapes) for path in paths]
    arrays = {name: np.stack([evaluation[name] for evaluation in evaluations]) for name in shapes}
    return Stability(step=np.array([int(path.stem) for path in paths]), **arrays)


def _stability_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """What the fields of Stability are in one file."""
    sublayers = 2 * config.model.num_layers
    n = 1 if config.model.residual == "residual" else config.model.connections.streams
    others: dict[str, tuple[int, ...]] = {
        "res": (sublayers, n, n),
        "res_composite": (sublayers, n, n),
        "res_composite_rest": (sublayers, n, n),
        "pre": (sublayers, n),
        "post": (sublayers, n),
        "stream_norm": (sublayers + 1, n),
        "stream_cosine": (sublayers + 1,),
        "max_attention_logit": (sublayers // 2,),
        "learnable": (sublayers, 3),
    }
    return {f.name: others.get(f.name, (sublayers,)) for f in dataclasses.fields(Stability) if f.name != "step"}


def _read_arrays(path: AnyPath, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    try:
        # Opened here, because np.load leaves a file that it cannot make sense of open.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name]) for name in file.files}
    except Exception as error:  # a damaged archive makes zipfile and NumPy raise a dozen kinds, NotImplementedError among them
        raise _damaged(path, error) from error
    _require(shapes, arrays, path)
    for name, shape in shapes.items():
        if arrays[name].shape != shape or arrays[name].dtype.kind not in "biuf":
            raise _damaged(path, f"{name} is {arrays[name].dtype}{list(arrays[name].shape)}, not numbers of shape {list(shape)}")
    return {name: arrays[name].astype(np.float64) for name in shapes}
