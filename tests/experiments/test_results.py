"""Reading run folders, and the numbers of results.json against numbers worked out by hand."""

import json
import math

import numpy as np
import pytest
from fake_run import fake_train, tiny_config

from mhc_jax.config import override
from mhc_jax.errors import UserError
from mhc_jax.experiments import formats
from mhc_jax.experiments.ablation import ablation
from mhc_jax.experiments.results import Statistic, load_results, results_json, statistic
from mhc_jax.experiments.runs import save_runs
from mhc_jax.experiments.sinkhorn import column_errors


def write_runs(folder, runs, summaries, leave_out=()):
    """Fake runs whose summaries are then changed: {"mhc-seed0": {"loss": 3.0}}."""
    save_runs(runs, folder)
    for run in runs.runs:
        if run.name not in leave_out:
            path = folder / "runs" / run.name
            fake_train(run.config, path)
            summary = json.loads((path / "summary.json").read_text()) | summaries.get(run.name, {})
            (path / "summary.json").write_text(json.dumps(summary))


LOSSES = {
    "residual-seed0": {"loss": 4.0, "step_seconds": 0.1},
    "residual-seed1": {"loss": 4.2, "step_seconds": 0.2},
    "mhc-seed0": {"loss": 3.9, "step_seconds": 0.2},
    "mhc-seed1": {"loss": 4.4, "step_seconds": 0.3},
}


def test_means_spreads_and_paired_gaps(tmp_path):
    write_runs(tmp_path, ablation(tiny_config(), kinds=("residual", "mhc"), seeds=2), LOSSES)
    variants = results_json(load_results(tmp_path))["variants"]
    assert variants["residual"]["loss"] == {"mean": pytest.approx(4.1), "spread": pytest.approx(0.2 / math.sqrt(2)), "seeds": 2}
    # Gaps are -0.1 and +0.2: mean 0.05, and sample standard deviation 0.3 / sqrt(2).
    assert variants["mhc"]["loss_gap"] == {"mean": pytest.approx(0.05), "spread": pytest.approx(0.3 / math.sqrt(2)), "seeds": 2}
    assert variants["residual"]["loss_gap"] == {"mean": 0.0, "spread": 0.0, "seeds": 2}
    # Ratios of step times are 2 and 1.5.
    assert variants["mhc"]["step_time_ratio"]["mean"] == pytest.approx(1.75)
    assert set(variants["mhc"]["runs"]) == {"mhc-seed0", "mhc-seed1"}


def test_a_missing_run_has_no_entry_and_no_pair(tmp_path):
    runs = ablation(tiny_config(), kinds=("residual", "hc", "mhc"), seeds=2)
    write_runs(tmp_path, runs, LOSSES, leave_out=("residual-seed1", "hc-seed0", "hc-seed1"))
    results = results_json(load_results(tmp_path))
    assert results["missing"] == ["hc-seed0", "residual-seed1", "hc-seed1"]
    assert list(results["variants"]) == ["residual", "mhc"]
    assert results["variants"]["mhc"]["loss"]["seeds"] == 2
    assert results["variants"]["mhc"]["loss_gap"] == {"mean": pytest.approx(-0.1), "spread": None, "seeds": 1}


def test_a_gap_without_a_finished_baseline_stays_empty(tmp_path):
    write_runs(tmp_path, ablation(tiny_config(), kinds=("residual", "mhc")), {}, leave_out=("residual-seed0",))
    assert results_json(load_results(tmp_path))["variants"]["mhc"]["loss_gap"] == {"mean": None, "spread": None, "seeds": 0}


def test_statistic():
    assert statistic([1.0, 3.0]) == Statistic(2.0, math.sqrt(2), 2)
    assert statistic([5.0]) == Statistic(5.0, None, 1)
    assert statistic([]) == Statistic(None, None, 0)
    assert statistic([1.0, math.nan]) == Statistic(None, None, 2)


def test_a_value_that_was_not_finite_stays_null(tmp_path):
    write_runs(tmp_path, ablation(tiny_config(), kinds=("residual", "mhc")), {"mhc-seed0": {"loss": None, "gain_forward_max": None}})
    results = results_json(load_results(tmp_path))
    json.dumps(results, allow_nan=False)
    assert results["variants"]["mhc"]["loss"] == {"mean": None, "spread": None, "seeds": 1}
    assert results["variants"]["mhc"]["runs"]["mhc-seed0"]["gain_forward_max"] is None


def test_arrays_have_the_shapes_of_the_schema(tmp_path):
    config = tiny_config(steps=20, eval_every=10, layers=2)
    write_runs(tmp_path, ablation(config, kinds=("residual", "mhc")), {})
    plain, mhc = load_results(tmp_path).records
    assert mhc.train.loss.shape == (20,) and mhc.eval.loss.shape == (3,)
    assert mhc.eval.step.tolist() == mhc.stability.step.tolist() == [0, 10, 20]
    assert mhc.stability.res.shape == (3, 4, 4, 4) and plain.stability.res.shape == (3, 4, 1, 1)
    assert mhc.stability.stream_norm.shape == (3, 5, 4) and mhc.stability.learnable.shape == (3, 4, 3)
    assert (mhc.streams, plain.streams) == (4, 1)
    assert np.all(plain.stability.gain_forward_composite == 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", b'{"kind": "train"', r"metrics\.jsonl, line 1 is half-written"),
        ("metrics.jsonl", b'{"kind": "train", "step": 1}\n', r"metrics\.jsonl lacks loss"),
        ("metrics.jsonl", None, r"metrics\.jsonl is missing"),
        ("summary.json", b'{"name": ', r"summary\.json is half-written"),
        ("summary.json", b'{"name": "tiny"}', r"summary\.json lacks residual"),
        ("stability/00000040.npz", b"PK\x03\x04cut", r"00000040\.npz is half-written"),
        ("stability/00000040.npz", b"", r"00000040\.npz is half-written"),
        ("config.json", b'{"name": "tiny"}', r"config\.json cannot be used"),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, content, message):
    write_runs(tmp_path, ablation(tiny_config(), kinds=("residual",)), {})
    path = tmp_path / "runs" / "residual-seed0" / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_results(tmp_path)


def test_a_step_that_was_written_twice_is_an_error(tmp_path):
    write_runs(tmp_path, ablation(tiny_config(), kinds=("residual",)), {})
    path = tmp_path / "runs" / "residual-seed0" / "metrics.jsonl"
    path.write_text(path.read_text() + path.read_text().splitlines()[-2] + "\n")
    with pytest.raises(UserError, match="a step was written twice"):
        load_results(tmp_path)


def test_a_run_of_another_config_is_not_mixed_in(tmp_path):
    write_runs(tmp_path, ablation(tiny_config(), kinds=("residual",)), {})
    save_runs(ablation(override(tiny_config(), {"train.batch_size": 8}), kinds=("residual",)), tmp_path)
    with pytest.raises(UserError, match=r"train\.batch_size: 4 in the folder, 8 now"):
        load_results(tmp_path)


@pytest.mark.parametrize(("std", "median", "high"), [(1, 3e-13, 1.9e-6), (2, 8e-7, 1.2e-2), (4, 2.9e-3, 4.5e-2), (10, 2.9e-2, 1.1e-1)])
def test_sinkhorn_column_errors_against_an_independent_measurement(std, median, high):
    # 20,000 matrices with other random numbers, printed to one or two figures: medians agree to 12 %, 99th percentiles, which rest on 200
    # matrices, to 21 %.
    errors = column_errors(std, streams=4, steps=20)
    assert np.median(errors) == pytest.approx(median, rel=0.15)
    assert np.quantile(errors, 0.99) == pytest.approx(high, rel=0.25)


def test_formats():
    assert [formats.significant(x) for x in (1.0, 1.6234, 3120.4, 0.04123, 4.512e10, 0.0)] == [
        "1.00",
        "1.62",
        "3120",
        "0.0412",
        "4.51e10",
        "0",
    ]
    assert (formats.loss(3.91237), formats.gap(-0.021), formats.gap(0.021)) == ("3.9124", "-0.0210", "+0.0210")
    assert (formats.mebibytes(300 * 2**20), formats.percent(0.067), formats.count(1234567.2)) == ("300 MiB", "6.7 %", "1,234,567")
    assert formats.mean_and_spread(Statistic(1.0, 0.25, 2), formats.loss) == "1.0000 ± 0.2500"
    assert formats.mean(Statistic(None, None, 0), formats.loss) == formats.NONE
    assert formats.mean(Statistic(None, None, 1), formats.loss) == "not finite"
