"""A full disk ends a run with one message; with space again, the run goes on as if nothing had been.

The errors are the operating system's own: a limit on the size of files for what grows, /dev/full for what is written anew.
"""

import errno
import resource
import time

import jax
import pytest

from mhc_jax.errors import UserError
from mhc_jax.files import disk_is_full, write_atomically
from mhc_jax.train import loop
from mhc_jax.train.checkpoint import Checkpoints
from mhc_jax.train.events import Events
from mhc_jax.train.loop import train
from mhc_jax.train.metrics import read_lines
from mhc_jax.train.step import initial_state


@pytest.fixture
def limit():
    """Sets the largest size of a file, in bytes; lifted at the end of the test, or by `limit()`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def set_limit(size: int = before[0]) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield set_limit
    set_limit()


@pytest.fixture(scope="module")
def whole(tiny, compiled_once, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(tiny, folder, say=lambda line: None)


def curve(folder):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_lines(folder / "metrics.jsonl")]


def no_space_for(name):
    """Makes writing RUN/NAME fail."""

    def fill(folder, limit):
        (folder / f"{name}.tmp").symlink_to("/dev/full")

    return fill


FILLED = {
    "checkpoint": (lambda folder, limit: limit(10_000), 2),
    "metrics": (lambda folder, limit: limit((folder / "metrics.jsonl").stat().st_size + 10), 2),
    "stability": (no_space_for("stability/00000006.npz"), 4),
    "summary": (no_space_for("summary.json"), 8),
}


@pytest.mark.parametrize("what", FILLED)
def test_a_full_disk_is_one_message_and_the_run_goes_on_with_space(what, whole, tiny, tmp_path, monkeypatch, limit):
    fill, last_good = FILLED[what]
    with monkeypatch.context() as patch:
        stepped = loop.Progress.stepped

        def fill_at_step_3(self, step, loss, seconds):
            if step == 3:
                while not (tmp_path / "checkpoints" / "2").exists():
                    time.sleep(0.01)  # it is written in the background
                fill(tmp_path, limit)
            stepped(self, step, loss, seconds)

        patch.setattr(loop.Progress, "stepped", fill_at_step_3)
        with pytest.raises(UserError, match=rf"disk full.*the last good checkpoint is that of step {last_good}\. Free some space"):
            train(tiny, tmp_path, say=lambda line: None)
        limit()
    assert not (tmp_path / "summary.json").exists()
    said = []
    summary = train(tiny, tmp_path, say=said.append)
    assert f"resuming after step {last_good}" in said
    assert curve(tmp_path) == curve(whole[0])
    assert summary["loss"] == whole[1]["loss"]
    arrays = {path.name: path.read_bytes() for path in (whole[0] / "stability").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "stability").iterdir()} == arrays


def test_without_a_checkpoint_the_message_says_so(tiny, compiled_once, tmp_path, limit):
    (tmp_path / "config.txt.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"disk full.*there is no checkpoint yet"):
        train(tiny, tmp_path, say=lambda line: None)


def test_a_failed_write_takes_no_space_and_leaves_the_old_content(tmp_path, limit):
    path = tmp_path / "file"
    write_atomically(path, "old")
    limit(100)
    with pytest.raises(OSError) as error:
        write_atomically(path, "x" * 1000)
    limit()
    assert disk_is_full(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"


def test_a_checkpoint_that_does_not_fit_is_removed(tiny, tmp_path, limit):
    state = jax.jit(lambda: initial_state(tiny))()
    with Checkpoints(tmp_path, tiny) as checkpoints:
        checkpoints.save(state._replace(step=state.step + 1), {})
        checkpoints.wait()
        limit(1000)
        checkpoints.save(state._replace(step=state.step + 2), {})
        with pytest.raises(OSError) as error:
            checkpoints.wait()
        limit()
    assert error.value.errno == errno.EFBIG
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_events_fail_where_they_are_written(tmp_path, limit):
    """And do not wait for ever for a thread that has ended."""
    events = Events(tmp_path, purge_step=0)
    limit(1000)
    with pytest.raises(OSError, match="too large"):  # which of the calls fails depends on a buffer
        for step in range(1000):
            events.scalar("train/loss", 1.0, step)
        events.flush()
    limit()
    events.close()


@pytest.mark.parametrize(("number", "full"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EACCES, False), (errno.EIO, False)])
def test_only_a_lack_of_space_counts_as_a_full_disk(number, full):
    assert disk_is_full(OSError(number, "")) is full
    wrapped = KeyError()
    wrapped.__context__ = OSError(number, "")
    assert disk_is_full(wrapped) is full
    assert not disk_is_full(ValueError("disk full"))
