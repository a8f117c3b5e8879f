"""A run from start to finish, cut and resumed, and refused where it does not belong."""

import json

import jax
import numpy as np
import pytest
from etils import epath

from mhc_jax.config import override
from mhc_jax.errors import UserError
from mhc_jax.train import loop
from mhc_jax.train.checkpoint import Checkpoints
from mhc_jax.train.loop import train
from mhc_jax.train.metrics import read_lines
from mhc_jax.train.step import initial_state


def quiet(_):
    pass


pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(scope="module")
def run(tiny, compiled_once, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, train(tiny, folder, say=quiet)


def curve(folder, kind="train"):
    timing = ("seconds",)
    return [{k: v for k, v in line.items() if k not in timing} for line in read_lines(folder / "metrics.jsonl") if line["kind"] == kind]


def test_a_run_learns_and_leaves_what_the_docs_promise(run, tiny):
    folder, summary = run
    assert summary["loss"] < curve(folder, "eval")[0]["loss"] - 1
    assert [line["step"] for line in curve(folder)] == list(range(1, 9))
    assert [line["step"] for line in curve(folder, "eval")] == [0, 2, 4, 6, 8]
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert (folder / "config.txt").read_text().startswith('name = "tiny"\n')
    assert any((folder / "tensorboard").iterdir())
    with np.load(folder / "stability" / "00000008.npz") as arrays:
        assert arrays["res"].shape == (4, 4, 4)
        np.testing.assert_allclose(arrays["gain_forward_composite"], 1, atol=1e-5)
        np.testing.assert_array_equal(arrays["learnable"][0], [0, 1, 0])
        assert np.all(arrays["learnable"][1:] == 1)


def test_a_finished_run_is_not_trained_again(run, tiny, monkeypatch):
    folder, summary = run
    monkeypatch.setattr(loop, "make_mesh", None)
    assert train(tiny, folder, say=quiet) == summary


@pytest.mark.parametrize("cut_at", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_a_cut_run_goes_on_bit_for_bit(run, tiny, tmp_path, monkeypatch, cut_at):
    whole, summary = run
    with monkeypatch.context() as patch:
        stepped = loop.Progress.stepped

        def cut(self, step, loss, seconds):
            if step == cut_at:
                raise KeyboardInterrupt
            stepped(self, step, loss, seconds)

        patch.setattr(loop.Progress, "stepped", cut)
        with pytest.raises(KeyboardInterrupt):
            train(tiny, tmp_path / "cut", say=quiet)
    resumed = train(tiny, tmp_path / "cut", say=quiet)
    assert curve(tmp_path / "cut") == curve(whole)
    assert curve(tmp_path / "cut", "eval") == curve(whole, "eval")
    assert resumed["loss"] == summary["loss"]
    assert (tmp_path / "cut" / "stability" / "00000008.npz").read_bytes() == (whole / "stability" / "00000008.npz").read_bytes()


def test_checkpoints_keep_the_newest_and_the_best(run, tiny, tmp_path):
    folder, _ = run
    assert sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit()) == [6, 8]  # the newest is the best
    state = initial_state(tiny)
    with Checkpoints(tmp_path, tiny) as checkpoints:
        for step, loss in ((2, 3.0), (4, 1.0), (6, 2.0), (8, 2.5)):
            checkpoints.save(state._replace(step=state.step + step), {}, loss)
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [4, 6, 8]


def test_a_checkpoint_restores_every_array(run, tiny):
    folder, _ = run
    with Checkpoints(folder, tiny) as checkpoints:
        state, _ = checkpoints.restore(initial_state(tiny))
        again, _ = checkpoints.restore(initial_state(tiny))
    assert int(state.step) == 8
    assert jax.tree.structure(state) == jax.tree.structure(initial_state(tiny))
    # Types too, weak ones included, so that a resumed run finds its compiled programs in the cache.
    types = [[(x.dtype, x.weak_type) for x in jax.tree.leaves(s)] for s in (state, initial_state(tiny))]
    assert types[0] == types[1]
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(again)))
    assert not np.array_equal(state.model.embedding, initial_state(tiny).model.embedding)


@pytest.mark.slow
def test_a_run_without_experts_saves_and_restores(tiny, tmp_path):
    config = override(tiny, {"model.dense_layers": 2, "train.steps": 2})
    assert np.isfinite(train(config, tmp_path, say=quiet)["loss"])


def test_another_config_is_refused_with_the_field_and_both_values(run, tiny):
    folder, _ = run
    with pytest.raises(UserError, match=r"optimizer\.learning_rate: 0\.01 in the folder, 0\.02 now"):
        train(override(tiny, {"optimizer.learning_rate": 0.02}), folder, say=quiet)


def test_a_profile_that_would_not_be_complete_is_refused(tiny, tmp_path):
    with pytest.raises(UserError, match="a profile needs 15 steps, but 8 are left"):
        train(tiny, tmp_path, say=quiet, profile=True)


def test_a_profile_in_an_object_store_is_refused(tiny):
    with pytest.raises(UserError, match="a profile is written on this machine only, not to s3://bucket/run"):
        train(tiny, epath.Path("s3://bucket/run"), say=quiet, profile=True)
