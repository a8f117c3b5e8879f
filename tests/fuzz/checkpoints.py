"""Damaged checkpoint folders: what is restored is bit for bit what was saved, of the newest step that nobody touched or a later one."""

import contextlib
import functools
import json
import random
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from small import BASE

from mhc_jax.config import override
from mhc_jax.errors import UserError
from mhc_jax.train.checkpoint import Checkpoints
from mhc_jax.train.step import initial_state

from .harness import ACCEPTED, REFUSED, Check, Wrong, lasting_folder
from .mutate import damage_file, damage_json, write_odd_json

NAME, SHARE, SHORT = "checkpoints", 5, 4

CONFIG = override(
    BASE,
    {
        "model.residual": "residual",
        "model.num_layers": 1,
        "train.keep_last": 3,
        "train.eval_every": 1,
        "train.checkpoint_every": 1,
    },
)
STEPS = (1, 2, 3)


@functools.cache
def _states() -> dict[int, Any]:
    """By step: a state of random numbers; nothing is compiled for them."""
    shapes = jax.eval_shape(lambda: initial_state(CONFIG))
    draw = np.random.default_rng(0)
    return {
        step: jax.tree.map(lambda x: jnp.asarray(100 * draw.standard_normal(x.shape), x.dtype), shapes)._replace(step=jnp.int32(step))
        for step in STEPS
    }


@functools.cache
def _intact() -> Path:
    folder = lasting_folder()
    with Checkpoints(folder, CONFIG) as checkpoints:
        for step, state in _states().items():
            checkpoints.save(state, {"read": step}, 3.0 - step)
    if _check(folder, set()) != ACCEPTED:
        raise Wrong("an undamaged checkpoint is not restored")
    return folder


def case(rng: random.Random, room: Path) -> tuple[str, Check]:
    run = room / "run"
    shutil.copytree(_intact(), run)
    touched, done = set(), []
    for _ in range(rng.choice([1, 1, 2, 3, 8])):
        step = rng.choice([3, 3, 2, 1])
        folder = run / "checkpoints" / str(step)
        how = rng.choice(["file", "file", "values", "about", "array", "garbage", "extra", "move", "remove"])
        if how == "garbage":
            name = rng.choice(["abc", "²", "٣", "5", "00", "unfinished-7", "damaged-2", "-1", "1e3", "9" * 30, "7.tmp"])
            _litter(rng, run / "checkpoints" / name)
            done.append(f"garbage {name}")
            touched |= {9}
            continue
        if not folder.is_dir():
            continue
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        touched.add(step)
        if how == "about" and (folder / "about.json").is_file():
            _damage_about(rng, folder / "about.json", done)
        elif how == "values":
            _change_values(rng, folder, done)
        elif how == "array":
            arrays = sorted(path for path in (folder / "state").glob("*") if path.is_dir())
            if arrays:
                shutil.rmtree(target := rng.choice(arrays))
                done.append(f"{step}: {target.name} removed")
        elif how == "extra":
            (folder / rng.choice(["state/extra", "more.json", "state/model.embedding/9.9"])).write_bytes(rng.randbytes(50))
            done.append(f"{step}: one more file")
        elif how == "move":
            shutil.copytree(folder, run / "checkpoints" / rng.choice(["4", "17", "unfinished-4"]), dirs_exist_ok=True)
            touched |= {4, 17}
            done.append(f"{step}: a copy under another number")
        elif how == "remove":
            shutil.rmtree(folder)
            done.append(f"{step}: removed")
        elif files:
            done.append(f"{step}: {damage_file(rng, rng.choice(files))}")
    return "; ".join(done) or "nothing", lambda: _check(run, touched)


def _litter(rng: random.Random, path: Path) -> None:
    if rng.random() < 0.5 and not path.exists():
        path.write_bytes(rng.randbytes(20))
    else:
        path.mkdir(exist_ok=True)


def _damage_about(rng: random.Random, path: Path, done: list[str]) -> None:
    about, what = damage_json(rng, json.loads(path.read_text()), 1)
    write_odd_json(path, about)
    done.append(f"{path.parent.name}/about.json: {what}")


def _change_values(rng: random.Random, folder: Path, done: list[str]) -> None:
    """Numbers that are read without an error, but are not those that were saved."""
    name = rng.choice(sorted(path.name for path in _intact_arrays()))
    spec = {"driver": "zarr", "kvstore": f"file://{folder}/state/{name}/"}
    with contextlib.suppress(ValueError):  # damaged before
        store = ts.open(spec, open=True).result()
        values = np.array(store.read().result())
        words = values.reshape(-1).view(np.uint8)
        words[rng.randrange(words.size)] ^= 1 << rng.randrange(8)
        store.write(values).result()
        done.append(f"{folder.name}: a bit of {name}")


def _intact_arrays() -> list[Path]:
    return [path for path in (_intact() / "checkpoints" / "1" / "state").iterdir() if path.is_dir()]


def _check(run: Path, touched: set[int]) -> str:
    untouched = [step for step in STEPS if step not in touched]
    said: list[str] = []
    try:
        with Checkpoints(run, CONFIG, said.append) as checkpoints:
            restored = checkpoints.restore(_states()[1])
    except UserError as error:
        if untouched:
            raise Wrong(f"step {max(untouched)} was not touched, but: {error}") from error
        return REFUSED
    if restored is None:
        if untouched:
            raise Wrong(f"nothing was restored, although step {max(untouched)} was not touched")
        return ACCEPTED  # all removed
    state, position = restored
    step = int(state.step)
    if step not in STEPS or (untouched and step < max(untouched)):
        raise Wrong(f"step {step} was restored, although step {max(untouched)} was not touched")
    if position != {"read": step}:
        raise Wrong(f"the data position {position} came back with step {step}")
    known, found = jax.tree.leaves(_states()[step]), jax.tree.leaves(state)
    if any(a.dtype != b.dtype or np.asarray(a).tobytes() != np.asarray(b).tobytes() for a, b in zip(known, found, strict=True)):
        raise Wrong(f"the arrays of step {step} are not those that were saved")
    return ACCEPTED
