"""Everything that a run needs to go on exactly as it was, saved in the background and checked when it is read.

A checkpoint holds parameters, optimizer moments, router biases and the step as nested dictionaries of arrays (no Flax types, so that it
outlives Flax); and in about.json the data position, the config, the held-out loss and a fingerprint of every array.
"""

import hashlib
import json
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from mhc_jax import config as configs
from mhc_jax.config import Config
from mhc_jax.errors import UserError
from mhc_jax.files import AnyPath, is_remote, write_json
from mhc_jax.nn.module import Module, from_dict, to_dict
from mhc_jax.train import arrays as on_disk
from mhc_jax.train import memory, steps
from mhc_jax.train.arrays import Damaged
from mhc_jax.train.fingerprint import fingerprints
from mhc_jax.train.folder import check_same_config
from mhc_jax.train.step import TrainState

PART_SECONDS = 1200.0  # how long the first process waits for the others' parts of a checkpoint

T = TypeVar("T")


class Checkpoints:
    """RUN/checkpoints: the newest `train.keep_last` and the `train.keep_best` of lowest held-out loss. A context manager.

    With several processes, all of them call every method; they agree on what is damaged, and the first one renames and removes.
    """

    def __init__(self, folder: AnyPath, config: Config, say: Callable[[str], None] = print):
        self._config, self._say, self._rows = config, say, memory.rows_on_disk(config)
        self._first, self._several = jax.process_index() == 0, jax.process_count() > 1
        self._folder = epath.Path(folder if is_remote(folder) else folder.resolve()) / "checkpoints"
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._losses: dict[int, float | None] = {}  # of the complete checkpoints
        if self._first:
            self._folder.mkdir(parents=True, exist_ok=True)
            for step in steps.remove_unfinished(self._folder):
                say(f"the checkpoint of step {step} was not complete, because the run was cut while writing it: removed")

    def save(self, state: TrainState, data_state: dict[str, Any], heldout_loss: float | None = None) -> None:
        """Copies the state and returns; writing goes on in the background. A step that has a complete checkpoint is not saved again.

        `heldout_loss` decides which checkpoints are best; one saved without it is never among them.

        Raises:
          OSError, ValueError: the checkpoint before could not be written, see `arrays.write`.
        """
        self.wait()
        step, tree = int(state.step), _plain(state)
        if self._newest(below=step + 1) == step:
            return
        content = {
            "config": configs.to_json(self._config),
            "data": data_state,
            "heldout_loss": heldout_loss if heldout_loss is not None and np.isfinite(heldout_loss) else None,
            "fingerprints": fingerprints(tree),
        }
        arrays, folder = on_disk.to_host(tree, self._rows), steps.unfinished(self._folder, step)
        self._writing = self._thread.submit(self._write, step, folder, arrays, content)

    def restore(self, like: TrainState, step: int | None = None) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest undamaged state (from `step` on back) and its data position, placed like `like`; None where there is no checkpoint.

        A damaged checkpoint is renamed, said, and passed over for the one before.

        Raises:
          UserError: the checkpoint was written with another config, or all are damaged.
        """
        self.wait()
        candidate = self._newest() if step is None else step
        while candidate is not None:
            try:
                return self._read(candidate, like)
            except Damaged as error:
                moved = self._move_aside(candidate)
                self._say(f"the checkpoint of step {candidate} is damaged and passed over ({error}); it lies in {moved} now")
            candidate = self._newest(below=candidate)
        # Not only those of this call: the next start must not take an earlier refusal for a run that has not begun.
        if damaged := steps.set_aside(self._folder):
            raise UserError(
                f"every checkpoint in {self._folder} is damaged: {', '.join(damaged)}. Put a good copy of one back under the number of its "
                "step, or delete the run folder to start again from step 0"
            )
        return None

    def discard_after(self, step: int) -> None:
        """Removes the checkpoints of later steps: after going back to `step`, they belong to a course that is not taken."""
        self.wait()
        if self._first:
            self._remove([later for later in steps.complete(self._folder) if later > step])

    def check(self) -> None:
        """Raises the error of a write in the background if it has failed by now; costs nothing."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Waits for the write in the background, raises its error, and removes checkpoints that need not be kept any longer."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result()
        except Exception:
            if self._first:  # on a full disk, it would take space from the next attempt
                steps.remove_unfinished(self._folder)
            raise
        if self._first:
            keep = self._config.train
            self._remove(steps.surplus(self._known_losses(), last=keep.keep_last, best=keep.keep_best, every=keep.checkpoint_every))

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Waits for the last write, also when a run is interrupted."""
        with self._thread:
            self.wait()

    def _write(self, step: int, folder: epath.Path, arrays: list[on_disk.HostArray], content: dict[str, Any]) -> None:
        """In the background: no collective operation here, since those of the training step must come in the same order everywhere."""
        on_disk.write(folder / "state", arrays, describe=self._first)
        if self._several:
            folder.mkdir(parents=True, exist_ok=True)  # a process whose devices hold copies alone has written nothing, perhaps as the first
            (folder / f"part-{jax.process_index()}").write_text("")
        if not self._first:
            return
        deadline = time.monotonic() + PART_SECONDS
        while self._several and len(list(folder.glob("part-*"))) < jax.process_count():
            if time.monotonic() > deadline:
                raise TimeoutError(f"other processes have not written their parts of the checkpoint of step {step}")
            time.sleep(0.1)
        write_json(folder / steps.ABOUT, {"content": content, "sha256": _digest(content)})
        steps.complete_one(self._folder, step)

    def _read(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Reads one checkpoint and compares it with what was saved; in every process with the same outcome."""
        path = self._folder / str(step)
        content = self._agreed(lambda: read_about(path / steps.ABOUT))
        check_same_config(configs.from_json(content["config"]), self._config, f"the checkpoint of step {step}")
        tree = self._agreed(lambda: on_disk.read(path / "state", _plain(like), self._rows))
        found, saved = fingerprints(tree), content["fingerprints"]
        if changed := [name for name, number in found.items() if saved.get(name) != number]:
            raise Damaged(f"{len(changed)} of {len(found)} arrays differ from what was saved: {', '.join(changed[:3])}")
        if int(tree["step"]) != step:
            raise Damaged(f"it holds step {int(tree['step'])}: a copy under another name")
        return _rebuilt(like, tree), content["data"]

    def _newest(self, below: int | None = None) -> int | None:
        """The newest complete checkpoint, as the first process sees it: a shared file system may not show all processes the same."""
        found = [step for step in steps.complete(self._folder) if below is None or step < below]
        newest = np.int64(found[-1] if found else -1)
        if self._several:
            newest = multihost_utils.broadcast_one_to_all(newest)
        return None if newest < 0 else int(newest)

    def _agreed(self, read: Callable[[], T]) -> T:
        """The result of reading; Damaged in every process when it is so in one."""
        result: T
        damage: Damaged | None = None
        try:
            result = read()
        except Damaged as error:
            damage = error
        if self._several and multihost_utils.process_allgather(np.array(damage is not None)).any():
            damage = damage or Damaged("another process could not read its part")
        if damage is not None:
            raise damage
        return result

    def _move_aside(self, step: int) -> epath.Path:
        return steps.move_aside(self._folder, step) if self._first else self._folder / f"damaged-{step}"

    def _remove(self, surplus: list[int]) -> None:
        for step in surplus:
            (self._folder / str(step)).rmtree(missing_ok=True)

    def _known_losses(self) -> dict[int, float | None]:
        """Held-out losses of the complete checkpoints; those that an earlier process wrote are read once."""
        found = steps.complete(self._folder)
        for step in set(found) - set(self._losses):
            try:
                self._losses[step] = read_about(self._folder / str(step) / steps.ABOUT)["heldout_loss"]
            except Damaged:
                self._losses[step] = None  # said when the run would resume from it
        return {step: self._losses[step] for step in found}


def read_about(path: epath.Path) -> dict[str, Any]:
    """The content of about.json, when it is what was saved."""
    try:
        about = json.loads(path.read_bytes())
        content, digest = about["content"], about["sha256"]
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise Damaged("about.json is missing") from None
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged("about.json cannot be read") from error
    if digest != _digest(content):
        raise Damaged("about.json differs from what was saved")
    return content


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _plain(state: TrainState) -> dict[str, Any]:
    """Nested dictionaries and lists of arrays; modules inside the optimizer state become dictionaries too."""
    optimizer = [to_dict(part) for part in jax.tree.leaves(state.optimizer, is_leaf=_is_module)]
    router_bias = [state.router_bias] if state.router_bias.size else []  # without experts there is nothing to save
    counts = {"step": state.step, "skipped_in_row": state.skipped_in_row}
    plain = {"model": to_dict(state.model), "optimizer": optimizer, "router_bias": router_bias, **counts}
    if state.memory is not None:
        plain["memory"] = memory.to_plain(state.memory)
    return plain


def _rebuilt(like: TrainState, plain: dict[str, Any]) -> TrainState:
    parts, structure = jax.tree.flatten(like.optimizer, is_leaf=_is_module)
    optimizer = [from_dict(part, value) if _is_module(part) else value for part, value in zip(parts, plain["optimizer"])]
    bias = like.router_bias  # perhaps no more than a shape
    (router_bias,) = plain["router_bias"] or [jax.device_put(np.zeros(bias.shape, bias.dtype), bias.sharding)]
    model = from_dict(like.model, plain["model"])
    tables = None if like.memory is None else memory.from_plain(like.memory, plain["memory"])
    return TrainState(model, jax.tree.unflatten(structure, optimizer), router_bias, plain["step"], plain["skipped_in_row"], tables)


def _is_module(x: Any) -> bool:
    return isinstance(x, Module)
