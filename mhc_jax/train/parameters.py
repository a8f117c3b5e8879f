"""Parameters out of a finished or stopped run, for another run to begin with or to generate text with. Nothing is written or renamed.

What the run needs to go on itself, optimizer and data position, stays where it is (`checkpoint`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from mhc_jax.config import Config
from mhc_jax.data.ngrams.artifact import FILE as ENGRAM_FILE
from mhc_jax.data.ngrams.artifact import load_artifact
from mhc_jax.data.prepared import Prepared
from mhc_jax.errors import UserError
from mhc_jax.files import AnyPath, is_remote, to_path
from mhc_jax.nn.module import from_dict, to_dict
from mhc_jax.train import arrays as on_disk
from mhc_jax.train import memory, steps
from mhc_jax.train.arrays import Damaged
from mhc_jax.train.checkpoint import read_about
from mhc_jax.train.fingerprint import fingerprints
from mhc_jax.train.folder import saved_config
from mhc_jax.train.step import TrainState

TOKENIZER_FILE = "tokenizer.json"  # of a run folder


def parameters_of(folder: AnyPath, config: Config, like: TrainState) -> tuple[TrainState, int, list[str]]:
    """`like` with the model, router biases and tables of the run's newest undamaged checkpoint.

    Args:
      folder: of the run.
      config: of the state that is filled.
      like: arrays, or their shapes with the shardings that they are to have. What the checkpoint lacks is taken from here.

    Returns:
      The state, the step of the checkpoint, and the names of the parameters that it lacks.

    Raises:
      UserError: there is no checkpoint, none is undamaged, or one of its arrays has another shape than ours.
    """
    checkpoints = epath.Path(folder if is_remote(folder) else folder.resolve()) / "checkpoints"
    found = steps.complete(checkpoints)
    if not found:
        raise UserError(f"{folder} holds no checkpoint; train it first, for at least train.checkpoint_every steps")
    reasons = []
    for step in reversed(found):
        try:
            return _read(checkpoints / str(step), config, like, step)
        except Damaged as error:
            reasons.append(f"step {step}: {error}")
    raise UserError(f"no checkpoint in {checkpoints} can be used. {'; '.join(reasons)}")


def begun_from(state: TrainState, config: Config) -> tuple[TrainState, str]:
    """The initial state with the parameters of `train.init_from`, and a line that says what was taken."""
    assert config.train.init_from is not None
    folder = to_path(config.train.init_from)
    state, step, missing = parameters_of(folder, config, state)
    anew = f"; these begin anew: {', '.join(missing)}" if missing else ""
    return state, f"beginning with the parameters of {folder} after step {step}{anew}"


def check_begin(config: Config, data: Prepared) -> None:
    """Refuses a `train.init_from` that is no run, or one whose tokens or rows of tables mean something else.

    Raises:
      UserError: says which.
    """
    if config.train.init_from is None:
        return
    folder = to_path(config.train.init_from)
    if not (folder / "config.json").exists():
        raise UserError(f"train.init_from: there is no run in {folder}; give the folder of one")
    theirs, ours = saved_config(folder).model, config.model
    if (folder / TOKENIZER_FILE).exists() and (folder / TOKENIZER_FILE).read_text() != data.sources[0].tokenizer.read_text():
        raise UserError(
            f"train.init_from: {folder} was trained with another tokenizer, so its embeddings mean other tokens; set data.tokenizer to "
            f"{folder / TOKENIZER_FILE}"
        )
    if (theirs.engram is None) != (ours.engram is None):
        raise UserError(f"train.init_from: of {folder} and this config one has model.engram and the other has not; make them agree")
    if ours.engram is not None:
        if ours.engram.tables.placement == "host":
            raise UserError('train.init_from reads tables into device memory; set model.engram.tables.placement to "device"')
        load_artifact(folder / ENGRAM_FILE, ours.engram, data.tokenizer_fingerprint)


def _read(path: epath.Path, config: Config, like: TrainState, step: int) -> tuple[TrainState, int, list[str]]:
    saved = read_about(path / steps.ABOUT)["fingerprints"]
    wanted: dict[str, Any] = {"model": to_dict(like.model)}
    if like.router_bias.size:
        wanted["router_bias"] = [like.router_bias]
    if like.memory is not None:
        wanted["memory"] = {"tables": list(like.memory.tables)}  # moments are the other run's
    leaves, structure = jax.tree_util.tree_flatten_with_path(wanted)
    keys = [jax.tree_util.keystr(place) for place, _ in leaves]
    names = [on_disk.name_of(place) for place, _ in leaves]
    present = {name: leaf for key, name, (_, leaf) in zip(keys, names, leaves) if key in saved}
    if not any(name.startswith("model.") for name in present):
        raise Damaged("it holds no parameter that this model has")
    read = on_disk.read(path / "state", present, memory.rows_on_disk(config))
    numbers = dict(zip(present, fingerprints(list(read.values())).values()))
    if changed := [name for key, name in zip(keys, names) if name in read and numbers[name] != saved[key]]:
        raise Damaged(f"{', '.join(changed[:3])} differ from what was saved")
    filled = jax.tree.unflatten(structure, [read.get(name, leaf) for name, (_, leaf) in zip(names, leaves)])
    tables = None if like.memory is None else like.memory._replace(tables=tuple(filled["memory"]["tables"]))
    (bias,) = filled.get("router_bias", [_empty(like.router_bias)])
    missing = [name for name in names if name not in read]
    return like._replace(model=from_dict(like.model, filled["model"]), router_bias=bias, memory=tables), step, missing


def _empty(like: Any) -> jax.Array:
    """The router biases of a network without experts, which no checkpoint holds."""
    return like if isinstance(like, jax.Array) else jnp.zeros(like.shape, like.dtype, device=like.sharding)
