"""What happens to a run when its losses go wrong or its machine is taken away: the same curve as if nothing had, or a message."""

import json
import os
import signal

import jax
import numpy as np
import pytest

from mhc_jax.cli import main
from mhc_jax.config import override
from mhc_jax.errors import Preempted, UserError
from mhc_jax.train import loop, watch
from mhc_jax.train.checkpoint import Checkpoints
from mhc_jax.train.loop import train
from mhc_jax.train.metrics import read_lines
from mhc_jax.train.step import initial_state

pytestmark = pytest.mark.usefixtures("compiled_once")


def quiet(_):
    pass


def curve(folder):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_lines(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory, compiled_once):
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(tiny, folder, say=quiet)
    return folder


# --- losses that are not finite


@pytest.fixture
def poisoned(monkeypatch):
    """The embedding is not a number, so that no step has a finite loss; the test gets the initial values of the output head."""
    placed = loop.placed_initial_state
    unembed = []

    def poison(config, mesh, rules):
        state = placed(config, mesh, rules)
        state.model.embedding = state.model.embedding * np.nan
        unembed.append(np.array(state.model.unembed))
        return state

    monkeypatch.setattr(loop, "placed_initial_state", poison)
    return unembed


@pytest.mark.slow
def test_steps_that_are_not_finite_change_nothing_and_are_counted(tiny, tmp_path, poisoned):
    summary = train(tiny, tmp_path, say=quiet)
    assert summary["skipped_steps"] == 8 and summary["loss"] is None and summary["grad_norm"] is None
    steps = [line for line in curve(tmp_path) if line["kind"] == "train"]
    assert [line["skipped"] for line in steps] == [1.0] * 8
    assert [line["learning_rate"] for line in steps][:3] == pytest.approx([5e-3, 1e-2, 1e-2])  # the schedule goes on
    initial = initial_state(tiny)
    with Checkpoints(tmp_path, tiny, quiet) as checkpoints:
        state, _ = checkpoints.restore(initial)
    assert int(state.step) == int(state.skipped_in_row) == 8
    assert np.array_equal(state.model.unembed, poisoned[0])
    assert np.array_equal(state.router_bias, initial.router_bias)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(state.optimizer), jax.tree.leaves(initial.optimizer)))


@pytest.mark.slow
def test_too_many_of_them_stop_the_run_every_time(tiny, tmp_path, poisoned):
    config = override(tiny, {"train.max_nonfinite_steps": 5})
    for _ in range(2):  # the second time it goes on from the checkpoint of step 4, and with its count
        with pytest.raises(UserError, match=r"after step 5: .* last 5 steps was not finite"):
            train(config, tmp_path, say=quiet)
    assert not (tmp_path / "summary.json").exists()


# --- loss spikes


class Garbled:
    """Batches of which some, counted from 1, have random targets; or are left out."""

    def __init__(self, batches, garbled=(), left_out=()):
        self._batches, self._garbled, self._left_out = batches, garbled, left_out
        self._count = 0

    def __next__(self):
        self._count += 1
        batch = next(self._batches)
        if self._count in self._left_out:
            return next(self)
        if self._count in self._garbled:
            return {**batch, "targets": np.random.default_rng(self._count).integers(0, 280, batch["targets"].shape, np.int32)}
        return batch

    def get_state(self):
        return {"batches": self._batches.get_state(), "count": self._count}

    def set_state(self, state):
        self._count = state["count"]
        self._batches.set_state(state["batches"])


@pytest.fixture
def with_batches(monkeypatch):
    """Lets the test say what happens to the batches of the runs that follow."""
    monkeypatch.setattr(watch, "WINDOW", 3)
    open_data = loop._open_data

    def arrange(**changes):
        def opened(*args):
            batches, heldout = open_data(*args)
            return Garbled(batches, **changes), heldout

        monkeypatch.setattr(loop, "_open_data", opened)

    return arrange


def rolling(tiny, **changes):
    return override(tiny, {"train.rollback_deviations": 3.0, **{f"train.{k}": v for k, v in changes.items()}})


@pytest.mark.parametrize(
    ("garbled", "checkpoint_every", "back"),
    [
        ((6,), 2, [(6, 4)]),
        ((6, 8), 2, [(6, 4), (6, 4)]),  # batch 8 is the second one after the gap: step 6 again
        pytest.param((6,), 8, [(6, 0)], marks=pytest.mark.slow),  # no checkpoint yet
    ],
)
def test_a_spike_goes_back_and_leaves_its_data_out(tiny, tmp_path, with_batches, garbled, checkpoint_every, back):
    config = rolling(tiny, checkpoint_every=checkpoint_every)
    said = []
    with_batches(garbled=garbled)
    summary = train(config, tmp_path / "spiked", say=said.append)
    rollbacks = json.loads((tmp_path / "spiked" / "rollbacks.json").read_text())
    assert [(entry["at_step"], entry["to_step"]) for entry in rollbacks] == back
    assert summary["rollbacks"] == len(back)
    assert sum("going back" in line for line in said) == len(back)
    # The same as a run that never saw the batches between the checkpoint and the spike.
    first, skipped = back[0][1], sum(entry["skipped_batches"] for entry in rollbacks)
    with_batches(left_out=range(first + 1, first + skipped + 1))
    train(config, tmp_path / "clean", say=quiet)
    assert curve(tmp_path / "spiked") == curve(tmp_path / "clean")
    assert len(list((tmp_path / "spiked" / "stability").iterdir())) == 5


@pytest.mark.slow
def test_a_run_that_is_cut_while_it_goes_back_takes_the_same_course(tiny, tmp_path, with_batches, monkeypatch):
    with_batches(garbled=(6,))
    train(rolling(tiny), tmp_path / "whole", say=quiet)
    restore, calls = loop._Run.restore, []

    def cut(self, initial):
        restore(self, initial)
        calls.append(1)
        if len(calls) == 2:  # rollbacks.json is written, the state is back
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "restore", cut)
        with pytest.raises(KeyboardInterrupt):
            train(rolling(tiny), tmp_path / "cut", say=quiet)
    assert train(rolling(tiny), tmp_path / "cut", say=quiet)["rollbacks"] == 1
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")


def test_a_run_that_would_go_back_too_often_stops(tiny, tmp_path, with_batches):
    with_batches(garbled=(6,))
    with pytest.raises(UserError, match="went back 0 times already"):
        train(rolling(tiny, max_rollbacks=0), tmp_path, say=quiet)


# --- SIGTERM


@pytest.fixture
def terminated(monkeypatch):
    """Sends SIGTERM in the middle of the given step of the next run."""

    def at(step):
        calls, check = [], Checkpoints.check

        def terminate(self):
            calls.append(1)
            if len(calls) == step:
                os.kill(os.getpid(), signal.SIGTERM)
            check(self)

        monkeypatch.setattr(Checkpoints, "check", terminate)

    return at


@pytest.mark.slow
def test_a_run_goes_back_to_regular_checkpoints_as_if_sigterm_had_not_come(tiny, tmp_path, with_batches, terminated):
    config = rolling(tiny)
    with_batches(garbled=(6,))
    train(config, tmp_path / "whole", say=quiet)
    terminated(5)  # this checkpoint is the newest when step 6 turns out to be a spike
    with pytest.raises(Preempted):
        train(config, tmp_path / "stopped", say=quiet)
    train(config, tmp_path / "stopped", say=quiet)
    assert curve(tmp_path / "stopped") == curve(tmp_path / "whole")
    assert json.loads((tmp_path / "stopped" / "rollbacks.json").read_text())[0]["to_step"] == 4
    assert sorted(path.name for path in (tmp_path / "stopped" / "checkpoints").iterdir()) == ["6", "8"]


def test_sigterm_when_the_run_has_just_finished_still_stops_what_would_follow(tiny, tmp_path, monkeypatch):
    write = loop.write_json

    def late(path, data):
        write(path, data)
        if path.name == "summary.json":
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop, "write_json", late)
    with pytest.raises(Preempted, match="just finished"):
        train(tiny, tmp_path, say=quiet)
    assert train(tiny, tmp_path, say=quiet)["steps"] == 8


def test_sigterm_saves_the_step_at_hand_and_the_curve_goes_on_undisturbed(tiny, whole, tmp_path, terminated):
    before = signal.getsignal(signal.SIGTERM)
    terminated(5)  # which no regular checkpoint would hold
    with pytest.raises(Preempted, match="after step 5, whose state is saved"):
        train(tiny, tmp_path, say=quiet)
    assert signal.getsignal(signal.SIGTERM) is before
    assert (tmp_path / "checkpoints" / "5").is_dir()
    assert curve(tmp_path)[-1]["step"] == 5
    said = []
    train(tiny, tmp_path, say=said.append)
    assert "resuming after step 5" in said
    assert curve(tmp_path) == curve(whole)
    # It was kept while it was among the newest, and never as one of the best.
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["6", "8"]


def test_sigterm_before_the_first_step_ends_at_once(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "compile_programs", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Preempted, match="before the first step"):
        train(tiny, tmp_path, say=quiet)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_the_command_line_says_so_in_one_line(monkeypatch, capsys, tmp_path):
    def preempted(*args, **kwargs):
        raise Preempted("stopped by SIGTERM after step 5")

    monkeypatch.setattr(loop, "train", preempted)
    assert main(["train", "laptop", "--out", str(tmp_path)]) == 143
    assert capsys.readouterr().err == "mhc-jax: stopped by SIGTERM after step 5\n"


def test_sigterm_between_runs_ends_the_command_too(monkeypatch, capsys, tmp_path):
    started = []

    def terminated(config, folder, **kwargs):
        started.append(folder)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop, "train", terminated)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["ablate", "laptop", "--out", str(tmp_path)]) == 143
    assert "mhc-jax: stopped by SIGTERM" in capsys.readouterr().err
    assert len(started) == 1
    assert signal.getsignal(signal.SIGTERM) is before


# --- metrics


def test_what_a_cut_run_left_after_the_restored_step_is_removed(tiny, whole, tmp_path):
    with open(whole / "metrics.jsonl", "rb") as file:
        lines = file.readlines()
    folder = tmp_path / "cut"
    train(tiny, folder, say=quiet)
    (folder / "summary.json").unlink()
    for newer in ("8",):
        (folder / "checkpoints" / newer).rename(tmp_path / newer)
    # The last step's line is cut, one after the restored step is no text, and a later evaluation's array was left half-written.
    (folder / "metrics.jsonl").write_bytes(b"".join(lines[:-3]) + b"\xff\xfe garbage\n" + lines[-2] + lines[-1][:20])
    (folder / "stability" / "00000009.npz.tmp").write_bytes(b"half")
    train(tiny, folder, say=quiet)
    assert curve(folder) == curve(whole)
    assert {path.name for path in (folder / "stability").iterdir()} == {path.name for path in (whole / "stability").iterdir()}
    assert (folder / "stability" / "00000008.npz").read_bytes() == (whole / "stability" / "00000008.npz").read_bytes()


@pytest.mark.parametrize("damage", ["{", "[" * 100_000, '{"kind": "train", "step": 3}', "3"])
def test_metrics_that_are_damaged_before_the_restored_step_are_refused(tiny, tmp_path, damage):
    train(tiny, tmp_path, say=quiet)
    (tmp_path / "summary.json").unlink()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines[:3], damage, *lines[4:]]) + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl is missing or damaged: it ends before step 8"):
        train(tiny, tmp_path, say=quiet)
