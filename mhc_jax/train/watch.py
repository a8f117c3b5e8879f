"""Losses that go wrong: what counts as a spike, when a run must stop, and the record of the times that it went back.

Nothing here touches the model: the loop asks after every step, and does what it is told.
"""

import dataclasses
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from mhc_jax.config import TrainConfig
from mhc_jax.errors import UserError
from mhc_jax.files import AnyPath, read_json, write_json

WINDOW = 50  # steps before a step that tell what its loss should be
REPORTED = 6.0  # standard deviations above which a loss is counted as a spike in summary.json


def is_spike(loss: float, before: Iterable[float], deviations: float) -> bool:
    """Whether a loss lies more than so many standard deviations above the mean of the (WINDOW) losses before."""
    losses = np.fromiter(before, float)
    return bool(loss > losses.mean() + deviations * losses.std())


def count_spikes(losses: Iterable[float]) -> int:
    """Spikes among the losses of consecutive steps. Losses that are not finite are passed over."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    return sum(is_spike(finite[i], finite[i - WINDOW : i], REPORTED) for i in range(WINDOW, len(finite)))


class Spike(Exception):
    """A loss at which the run goes back to a checkpoint."""

    def __init__(self, step: int, loss: float):
        super().__init__(f"the loss of step {step}, {loss:.4f}, is far above those of the {WINDOW} steps before")
        self.step = step
        self.loss = loss


class Watch:
    """Follows the losses of a run from the step where it starts or goes on.

    Args:
      config: says what is tolerated.
      losses: of the steps before, as far as they are known.
      skipped_in_row: how many of the last of them were skipped in a row.
    """

    def __init__(self, config: TrainConfig, losses: Iterable[float], skipped_in_row: int):
        self._config = config
        self._recent = deque((loss for loss in losses if math.isfinite(loss)), maxlen=WINDOW)
        self._skipped_in_row = skipped_in_row

    def after(self, step: int, loss: float, skipped: bool) -> None:
        """Takes note of a step.

        Raises:
          UserError: too many steps in a row were skipped.
          Spike: the loss is one, and the config says to go back.
        """
        self._skipped_in_row = self._skipped_in_row + 1 if skipped else 0
        if self._skipped_in_row >= self._config.max_nonfinite_steps:
            raise UserError(
                f"stopped after step {step}: the loss or the gradient of the last {self._skipped_in_row} steps was not finite, so that "
                "none of them changed the model. Look at metrics.jsonl for where it began; lower optimizer.learning_rate in another --out, "
                "or raise train.max_nonfinite_steps to be more patient"
            )
        if not math.isfinite(loss):
            return
        deviations = self._config.rollback_deviations
        if deviations and len(self._recent) == WINDOW and is_spike(loss, self._recent, deviations):
            raise Spike(step, loss)
        self._recent.append(loss)


@dataclass(frozen=True)
class Rollback:
    """One time that a run went back."""

    at_step: int  # whose loss was the spike
    loss: float  # nats
    to_step: int  # whose checkpoint the run went on from; 0: the beginning
    skipped_batches: int  # how many of the batches that follow that checkpoint's are left out because of this


class Rollbacks:
    """RUN/rollbacks.json: every time that the run went back, in their order.

    The file is written before the run goes on, so that a run that is cut anywhere takes the same course again.
    """

    def __init__(self, folder: AnyPath, config: TrainConfig):
        self._path = folder / "rollbacks.json"
        self._limit = config.max_rollbacks
        self._all: list[Rollback] = []
        if self._path.exists():
            try:
                self._all = [Rollback(**entry) for entry in read_json(self._path)]
            except TypeError as error:
                raise UserError(f"{self._path} is damaged ({error}); delete the run's folder to run it again") from error

    def __len__(self) -> int:
        return len(self._all)

    def batches_to_skip(self, step: int) -> int:
        """Batches to leave out after the checkpoint of a step."""
        return sum(rollback.skipped_batches for rollback in self._all if rollback.to_step == step)

    def forget_after(self, step: int, *, write: bool) -> None:
        """Drops what came after a step that a run goes on from because later checkpoints are damaged: it meets those spikes again."""
        kept = [rollback for rollback in self._all if rollback.to_step <= step]
        if len(kept) < len(self._all):
            self._all = kept
            self._write(write)

    def add(self, spike: Spike, to_step: int, *, write: bool) -> None:
        """Takes note that the run goes back because of a spike; one of several processes writes it down.

        Raises:
          UserError: it went back too often already.
        """
        if len(self._all) >= self._limit:
            raise UserError(
                f"stopped after step {spike.step}: {spike}, and the run went back {len(self._all)} times already (train.max_rollbacks). "
                "Lower optimizer.learning_rate or raise train.rollback_deviations in another --out"
            )
        self._all.append(Rollback(spike.step, spike.loss, to_step, spike.step - to_step))
        self._write(write)

    def _write(self, write: bool) -> None:
        if write:
            write_json(self._path, [dataclasses.asdict(rollback) for rollback in self._all])
