"""Everything that a run needs to go on exactly as it was, saved by orbax in the background.

A checkpoint holds parameters, optimizer moments, router biases and the step as nested dictionaries of arrays (no Flax types, so that it
outlives Flax), and the data position and config as JSON.
"""

from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from mhc_jax import config as configs
from mhc_jax.config import Config
from mhc_jax.nn.module import Module, from_dict, to_dict
from mhc_jax.train.folder import check_same_config
from mhc_jax.train.step import TrainState


class Checkpoints:
    """RUN/checkpoints: the newest `train.keep_last` and the `train.keep_best` of lowest held-out loss. A context manager."""

    def __init__(self, folder: Path, config: Config):
        self._config = config
        policies: list[Any] = [LatestN(config.train.keep_last)]
        if config.train.keep_best:
            policies.append(BestN(get_metric_fn=lambda metrics: metrics["loss"], reverse=True, n=config.train.keep_best))
        self._manager = ocp.CheckpointManager(
            folder.resolve() / "checkpoints",
            options=ocp.CheckpointManagerOptions(preservation_policy=AnyPreservationPolicy(policies), enable_async_checkpointing=True),
        )

    def save(self, state: TrainState, data_state: dict[str, Any], heldout_loss: float) -> None:
        """Copies the state and returns; writing goes on in the background. `heldout_loss` decides which checkpoints are best."""
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_plain(state)),
                data=ocp.args.JsonSave(data_state),
                config=ocp.args.JsonSave(configs.to_json(self._config)),
            ),
            metrics={"loss": heldout_loss},
        )

    def restore(self, like: TrainState, step: int | None = None) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest state (or that of `step`) and its data position, placed like `like`; None where there is no checkpoint.

        Raises:
          UserError: the checkpoint was written with another model.
        """
        step = self._manager.latest_step() if step is None else step
        if step is None:
            return None
        saved = self._manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))
        check_same_config(configs.from_json(saved["config"]), self._config, f"the checkpoint of step {step}")
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardRestore(_plain(like)), data=ocp.args.JsonRestore()),
        )
        return _rebuilt(like, restored["state"]), restored["data"]

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Waits for the last write, also when a run is interrupted."""
        self._manager.wait_until_finished()
        self._manager.close()


def _plain(state: TrainState) -> dict[str, Any]:
    """Nested dictionaries and lists of arrays; modules inside the optimizer state become dictionaries too."""
    optimizer = [to_dict(part) for part in jax.tree.leaves(state.optimizer, is_leaf=_is_module)]
    router_bias = [state.router_bias] if state.router_bias.size else []  # orbax refuses empty arrays
    return {"model": to_dict(state.model), "optimizer": optimizer, "router_bias": router_bias, "step": state.step}


def _rebuilt(like: TrainState, plain: dict[str, Any]) -> TrainState:
    parts, structure = jax.tree.flatten(like.optimizer, is_leaf=_is_module)
    optimizer = [from_dict(part, value) if _is_module(part) else value for part, value in zip(parts, plain["optimizer"])]
    (router_bias,) = plain["router_bias"] or [like.router_bias]
    return TrainState(from_dict(like.model, plain["model"]), jax.tree.unflatten(structure, optimizer), router_bias, plain["step"])


def _is_module(x: Any) -> bool:
    return isinstance(x, Module)
