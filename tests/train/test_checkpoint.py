"""What is saved comes back bit for bit or not at all: damage of every kind is noticed, said and passed over."""

import errno
import json
import re
import shutil

import jax
import numpy as np
import pytest
import tensorstore as ts

from mhc_jax.config import MeshConfig, override
from mhc_jax.errors import UserError
from mhc_jax.parallel.mesh import make_mesh
from mhc_jax.parallel.rules import Rules
from mhc_jax.train import arrays
from mhc_jax.train.checkpoint import Checkpoints
from mhc_jax.train.step import initial_state, state_shardings
from mhc_jax.train.steps import surplus


@pytest.fixture(scope="module")
def config(tiny):
    return override(tiny, {"train.keep_last": 3, "train.eval_every": 1, "train.checkpoint_every": 1})


@pytest.fixture(scope="module")
def states(config):
    """By step: the initial state with everything multiplied by the step."""
    state = initial_state(config)
    return {
        step: jax.tree.map(lambda x, step=step: x * np.asarray(step, x.dtype), state)._replace(step=state.step + step) for step in (1, 2, 3)
    }


@pytest.fixture(scope="module")
def saved(config, states, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    with Checkpoints(folder, config) as checkpoints:
        for step, state in states.items():
            checkpoints.save(state, {"read": step}, 3.0 - step)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def chunk(step_folder):
    """A file that holds values of a parameter."""
    return next(path for path in sorted((step_folder / "state" / "model.embedding").iterdir()) if path.name != ".zarray")


def flipped(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 16
    path.write_bytes(data)


def other_values(step_folder):
    """Values that decode without an error, but are not those that were saved."""
    spec = {"driver": "zarr", "kvstore": f"file://{step_folder}/state/model.embedding/"}
    store = ts.open(spec, open=True).result()
    values = store.read().result().copy()
    values.view(np.uint32)[1, 1] ^= 1  # the last bit of one number
    store.write(values).result()


def other_json(step_folder):
    path = step_folder / "about.json"
    about = json.loads(path.read_text())
    about["content"]["data"]["read"] = 2
    path.write_text(json.dumps(about))


DAMAGE = {
    "array file missing": (lambda f: chunk(f).unlink(), "model.embedding cannot be read"),
    "array file empty": (lambda f: chunk(f).write_bytes(b""), "model.embedding cannot be read"),
    "array file cut": (lambda f: chunk(f).write_bytes(chunk(f).read_bytes()[:-100]), "model.embedding cannot be read"),
    "array file begins wrong": (lambda f: flipped(chunk(f), 1), "model.embedding cannot be read"),
    "one bit of one number": (other_values, "1 of .* arrays differ from what was saved"),
    "description missing": (lambda f: (f / "state" / "step" / ".zarray").unlink(), "step cannot be read"),
    "description garbage": (lambda f: (f / "state" / "step" / ".zarray").write_text("{{"), "step cannot be read"),
    "array missing": (lambda f: shutil.rmtree(f / "state" / "step"), "step cannot be read"),
    "all arrays missing": (lambda f: shutil.rmtree(f / "state"), "cannot be read"),
    "about missing": (lambda f: (f / "about.json").unlink(), "about.json is missing"),
    "about cut": (lambda f: (f / "about.json").write_text((f / "about.json").read_text()[:500]), "about.json cannot be read"),
    "about garbage": (lambda f: (f / "about.json").write_bytes(b"\xff\x00garbage"), "about.json cannot be read"),
    "about of another kind": (lambda f: (f / "about.json").write_text("[1]"), "about.json cannot be read"),
    "another data position": (other_json, "about.json differs from what was saved"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_said_moved_aside_and_passed_over(kind, folder, config, states):
    damage, message = DAMAGE[kind]
    damage(folder / "checkpoints" / "3")
    said = []
    with Checkpoints(folder, config, said.append) as checkpoints:
        state, position = checkpoints.restore(states[1])
        assert same(state, states[2])
        assert position == {"read": 2}
        (line,) = said
        assert re.search(f"the checkpoint of step 3 is damaged.*{message}.*damaged-3 now$", line)
        checkpoints.save(states[3], {"read": 3}, 0.0)
    with Checkpoints(folder, config, said.append) as checkpoints:
        assert same(checkpoints.restore(states[1])[0], states[3])
    assert (folder / "checkpoints" / "damaged-3").exists()
    assert len(said) == 1


def test_a_second_damaged_checkpoint_of_a_step_gets_a_number(folder, config, states):
    for _ in range(2):
        chunk(folder / "checkpoints" / "3").unlink()
        with Checkpoints(folder, config, lambda line: None) as checkpoints:
            checkpoints.restore(states[1])
            checkpoints.save(states[3], {}, 0.0)
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"1", "2", "3", "damaged-3", "damaged-3-2"}


def test_when_all_are_damaged_the_run_does_not_start_again_by_itself(folder, config, states):
    for step in states:
        chunk(folder / "checkpoints" / str(step)).unlink()
    with (
        Checkpoints(folder, config, lambda line: None) as checkpoints,
        pytest.raises(UserError, match=r"every checkpoint in .* is damaged: damaged-1, damaged-2, damaged-3\. Put a good copy"),
    ):
        checkpoints.restore(states[1])
    with Checkpoints(folder, config) as checkpoints, pytest.raises(UserError, match=r"damaged: damaged-1, damaged-2, damaged-3"):
        checkpoints.restore(states[1])


def test_a_checkpoint_of_another_config_is_refused_and_left_alone(folder, config, states):
    other = override(config, {"optimizer.learning_rate": 0.5})
    with Checkpoints(folder, other) as checkpoints, pytest.raises(UserError, match=r"learning_rate: 0\.01 in the folder, 0\.5 now"):
        checkpoints.restore(states[1])
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"1", "2", "3"}


def test_what_a_cut_run_was_writing_is_removed_and_said(folder, config, states):
    (folder / "checkpoints" / "3").rename(folder / "checkpoints" / "unfinished-3")
    said = []
    with Checkpoints(folder, config, said.append) as checkpoints:
        assert same(checkpoints.restore(states[1])[0], states[2])
    assert said == ["the checkpoint of step 3 was not complete, because the run was cut while writing it: removed"]
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"1", "2"}


def test_what_comes_after_a_step_can_be_discarded(folder, config, states):
    with Checkpoints(folder, config) as checkpoints:
        checkpoints.discard_after(2)
        assert same(checkpoints.restore(states[1])[0], states[2])
        checkpoints.save(states[3], {"read": 30})
        assert checkpoints.restore(states[1])[1] == {"read": 30}


def test_a_write_that_fails_is_told_and_leaves_the_checkpoints_before_it(folder, config, states, monkeypatch):
    config = override(config, {"train.keep_last": 1, "train.keep_best": 0})

    def full(folder, arrays, describe):
        (folder / "begun").mkdir(parents=True)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(arrays, "write", full)
    with Checkpoints(folder, config) as checkpoints:
        checkpoints.save(states[3]._replace(step=states[3].step + 1), {}, 0.0)
        checkpoints._writing.exception()  # waits
        with pytest.raises(OSError, match="No space left"):
            checkpoints.check()
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"1", "2", "3"}


def test_the_best_are_known_after_a_restart(folder, config, states):
    """Losses were 2, 1, 0: the first two are neither newest nor best."""
    with Checkpoints(folder, override(config, {"train.keep_last": 1})) as checkpoints:
        checkpoints.save(states[3]._replace(step=states[3].step + 1), {}, 5.0)
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"3", "4"}


@pytest.mark.parametrize(
    ("losses", "last", "best", "removed"),
    [
        ({1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5}, 2, 1, [1]),
        ({1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5}, 1, 2, [1]),
        ({1: 3.0, 2: 1.0}, 2, 1, []),
        ({1: 1.0, 2: 2.0, 3: 3.0}, 1, 0, [1, 2]),
        ({1: None, 2: float("nan"), 3: 3.0, 4: None}, 1, 2, [1, 2]),
        ({}, 1, 1, []),
    ],
)
def test_the_newest_and_the_best_are_kept(losses, last, best, removed):
    assert surplus(losses, last=last, best=best, every=1) == removed


def test_checkpoints_that_sigterm_made_push_out_no_regular_one():
    assert surplus({10: 3.0, 20: 2.0, 24: None, 27: None}, last=2, best=1, every=10) == [24]
    assert surplus({10: 3.0, 20: 2.0, 27: None, 30: 1.0}, last=1, best=1, every=10) == [10, 20, 27]


def test_a_split_state_comes_back_as_it_was_split(config, states, tmp_path):
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    with jax.set_mesh(mesh), Checkpoints(tmp_path, config) as checkpoints:
        state = jax.device_put(states[1], state_shardings(config, mesh, Rules()))
        checkpoints.save(state, {})
        again, _ = checkpoints.restore(state)
    assert same(state, again)
    assert again.model.embedding.sharding == state.model.embedding.sharding
    assert len(list((tmp_path / "checkpoints/1/state/model.embedding").iterdir())) == 1 + 4  # a file for each part, written once
