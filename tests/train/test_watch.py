"""What counts as a spike, when a run must stop, and the record of going back."""

import json

import numpy as np
import pytest

from mhc_jax.config import TrainConfig
from mhc_jax.errors import UserError
from mhc_jax.train.watch import WINDOW, Rollback, Rollbacks, Spike, Watch, count_spikes, is_spike

NOISE = [2.0, 2.1] * WINDOW  # mean 2.05, standard deviation 0.05


def config(**changes):
    return TrainConfig(steps=100, batch_size=1, **changes)


@pytest.mark.parametrize(("loss", "spike"), [(2.34, False), (2.36, True), (float("nan"), False), (0.0, False)])
def test_a_spike_lies_so_many_deviations_above_the_mean(loss, spike):
    assert is_spike(loss, NOISE[:WINDOW], 6.0) is spike


def test_spikes_are_counted_against_the_window_before_and_not_before_there_is_one():
    assert count_spikes(NOISE) == 0
    assert count_spikes([9.0, *NOISE[: WINDOW - 1]]) == 0
    assert count_spikes([*NOISE[:70], 9.0, *NOISE]) == 1
    assert count_spikes([*NOISE[:70], float("nan"), 9.0, *NOISE]) == 1


def test_so_many_skipped_steps_in_a_row_stop_the_run_and_one_good_one_starts_the_count_again():
    watch = Watch(config(max_nonfinite_steps=3), [], skipped_in_row=0)
    for step, skipped in enumerate([True, True, False, True, True], start=1):
        watch.after(step, 2.0, skipped)
    with pytest.raises(UserError, match=r"after step 6: .* last 3 steps was not finite.*learning_rate"):
        watch.after(6, float("nan"), True)


def test_the_count_goes_on_where_a_run_was_cut():
    with pytest.raises(UserError, match="last 3 steps"):
        Watch(config(max_nonfinite_steps=3), [], skipped_in_row=2).after(8, float("nan"), True)


def test_going_back_must_be_asked_for():
    Watch(config(), NOISE, 0).after(101, 1e6, False)
    with pytest.raises(Spike, match=r"step 101, 3\.0000"):
        Watch(config(rollback_deviations=6.0), NOISE, 0).after(101, 3.0, False)
    Watch(config(rollback_deviations=6.0), NOISE[: WINDOW - 1], 0).after(50, 3.0, False)  # too little to tell


def test_a_cut_run_sees_the_same_spikes():
    """The losses of the steps before are all that the criterion needs, so that it can go on from metrics.jsonl."""
    losses = np.random.default_rng(0).normal(2.0, 0.1, 300)
    losses[[120, 250]] += 1.0

    def spikes(start):
        watch, found = Watch(config(rollback_deviations=5.0), losses[:start], 0), []
        for step in range(start, len(losses)):
            try:
                watch.after(step, losses[step], False)
            except Spike:
                found.append(step)
        return found

    assert spikes(0) == [120, 250]
    assert spikes(100) == [120, 250]
    assert spikes(200) == [250]


def test_rollbacks_are_remembered_and_add_up(tmp_path):
    rollbacks = Rollbacks(tmp_path, config(max_rollbacks=2))
    assert len(rollbacks) == 0 and rollbacks.batches_to_skip(100) == 0
    rollbacks.add(Spike(120, 9.0), 100, write=True)
    rollbacks.add(Spike(110, 8.0), 100, write=True)
    again = Rollbacks(tmp_path, config(max_rollbacks=2))
    assert len(again) == 2
    assert again.batches_to_skip(100) == 30 and again.batches_to_skip(50) == 0
    with pytest.raises(UserError, match="went back 2 times already"):
        again.add(Spike(105, 9.0), 100, write=True)
    assert [Rollback(**entry).at_step for entry in json.loads((tmp_path / "rollbacks.json").read_text())] == [120, 110]


def test_rollbacks_after_the_step_that_a_run_goes_on_from_are_forgotten(tmp_path):
    rollbacks = Rollbacks(tmp_path, config(max_rollbacks=5))
    for at_step, to_step in ((120, 100), (250, 200), (270, 200)):
        rollbacks.add(Spike(at_step, 9.0), to_step, write=True)
    rollbacks.forget_after(200, write=True)
    assert len(rollbacks) == 3
    rollbacks.forget_after(199, write=True)  # the checkpoint of step 200 was damaged
    assert len(rollbacks) == len(Rollbacks(tmp_path, config())) == 1
    assert rollbacks.batches_to_skip(200) == 0 and rollbacks.batches_to_skip(100) == 20


@pytest.mark.parametrize("content", ["[", '[{"at_step": 1}]', "[1]", "{}x"])
def test_a_damaged_record_is_refused(tmp_path, content):
    (tmp_path / "rollbacks.json").write_text(content)
    with pytest.raises(UserError, match=r"rollbacks\.json"):
        Rollbacks(tmp_path, config())
