"""The soak in small: three kills at chosen moments; and that the comparison would notice a difference."""

import json
import time

import pytest

from soak.kill_soak import Trial, differences, go_on, lines, phase_of, prepare, strike, table


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    bench, whole, _ = prepare(tmp_path_factory.mktemp("soak") / "bench")
    return bench, whole


MOMENTS = {
    "before the first step": lambda run: (run / "config.json").exists(),
    "training": lambda run: (run / "metrics.jsonl").exists() and len(lines(run)) > 30 and phase_of(run) == "training",
    "saving": lambda run: any((run / "checkpoints").glob("unfinished-*/state/*")),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_ends_like_one_that_was_not(moment, prepared):
    bench, whole = prepared
    run = bench.folder / moment.replace(" ", "-")
    process = bench.start(run, bench.folder / "output.log")
    while not MOMENTS[moment](run):
        assert process.poll() is None, (bench.folder / "output.log").read_text()
        time.sleep(0.001)
    assert strike(process, run) == moment
    assert go_on(bench, run, whole)[1] == ()
    assert {path.name for path in (run / "checkpoints").iterdir()} == {path.name for path in (whole / "checkpoints").iterdir()}


def a_run(folder, loss=1.0, bits=7):
    (folder / "stability").mkdir(parents=True)
    (folder / "checkpoints/200").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(json.dumps({"kind": "train", "step": 1, "loss": loss, "seconds": time.time()}) + "\n")
    (folder / "summary.json").write_text(json.dumps({"loss": loss, "step_seconds": time.time()}))
    (folder / "stability/00000001.npz").write_bytes(bytes([bits]))
    (folder / "checkpoints/200/about.json").write_text(json.dumps({"content": {"fingerprints": {"x": bits}}}))
    return folder


def test_differences_are_found_and_times_are_none(tmp_path):
    whole = a_run(tmp_path / "whole")
    assert differences(a_run(tmp_path / "same"), whole) == []
    assert differences(a_run(tmp_path / "loss", loss=1.0000001), whole) == ["metrics.jsonl", "loss in summary.json"]
    assert differences(a_run(tmp_path / "bits", bits=6), whole) == ["stability/00000001.npz", "fingerprints of the last checkpoint"]


def test_the_table_counts_kills_and_differences_by_phase():
    trials = [Trial(0, 1.0, "training", "40", ()), Trial(1, 1.0, "training", "20", ("x",)), Trial(2, 1.0, "saving", "-", ())]
    assert table(trials).splitlines()[2:] == ["| training | 2 | 20, 40 | 1 |", "| saving | 1 | - | 0 |", "| all | 3 | | 1 |"]
