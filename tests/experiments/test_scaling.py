"""The sweep over scale: its list, and its report from made runs whose losses follow a known law."""

import json

import numpy as np
import pytest
from fake_run import fake_train

from mhc_jax.config import difference
from mhc_jax.experiments import scaling
from mhc_jax.experiments.ablation import ablation
from mhc_jax.experiments.report import write_report
from mhc_jax.experiments.results import load_results
from mhc_jax.experiments.runlist import run_list
from mhc_jax.experiments.runs import save_runs
from mhc_jax.experiments.scaling import BUDGETS, KINDS, SEEDS, SIZES, scaling_laptop
from mhc_jax.experiments.scaling_law import Law
from mhc_jax.experiments.scaling_study import LawFit, active_parameters, gaps, is_scaling, kinds, tokens_of
from mhc_jax.plan.flops import training_flops

LAW = Law(1.5, 60.0, 53.0, 0.4, 0.4)  # best sizes within those of the list, at a thirtieth of its budgets
GAP = -0.03  # of mHC, at every point


def made(config, folder):
    """A fake run of two steps whose held-out loss follows LAW; the gap is against the plain residual of the same size and seed."""
    summary = fake_train(config, folder)
    kind = config.model.residual
    n = active_parameters(config.model)
    noise = 0.002 * np.random.default_rng([config.train.seed, n]).standard_normal()
    summary |= {"loss": float(LAW.loss(n, tokens_of(config))) + noise + (GAP if kind == "mhc" else 0), "tokens": tokens_of(config)}
    (folder / "summary.json").write_text(json.dumps(summary))
    return summary


@pytest.fixture
def two_steps(monkeypatch):
    """The list with a thirtieth of its compute: runs of a few steps, which the fake training writes in milliseconds."""
    monkeypatch.setattr(scaling, "BUDGETS", tuple(budget / 30 for budget in BUDGETS))
    return scaling_laptop()


def test_the_list_is_a_grid_of_sizes_budgets_kinds_and_seeds():
    runs = scaling_laptop()
    assert len(runs.runs) == len(SIZES) * len(BUDGETS) * len(KINDS) * SEEDS >= 48
    plain = {run.name.removeprefix("residual-"): run.config for run in runs.runs if run.config.model.residual == "residual"}
    for run in runs.runs:
        config = run.config
        if config.model.residual == "mhc":
            assert set(difference(config, plain[run.name.removeprefix("mhc-")])) == {"model.residual"}
            continue
        flops = training_flops(config, config.data.seq_len).total * tokens_of(config)
        assert min(abs(flops / budget - 1) for budget in BUDGETS) < 0.02  # IsoFLOP
        assert config.optimizer.warmup_steps / config.train.steps == pytest.approx(0.1, abs=0.01)
        assert config.train.steps % config.train.eval_every == 0
    assert max(tokens_of(run.config) for run in runs.runs) < 5.3e6  # of the standard library's 5.39 million: nothing is seen twice


def test_a_tiny_sweep_runs_resumes_and_reports(tmp_path, two_steps):
    calls = []

    def cut(config, folder):
        calls.append(folder.name)
        if len(calls) == 2:  # a report of one run, of the plain residual
            write_report(tmp_path, lambda line: None)
        if len(calls) == 25:
            raise KeyboardInterrupt
        return made(config, folder)

    reports = {"say": lambda line: None}
    with pytest.MonkeyPatch.context() as patch:  # one report at the end instead of one a run
        patch.setattr("mhc_jax.experiments.runlist.write_report", lambda folder, say: None)
        with pytest.raises(KeyboardInterrupt):
            run_list(two_steps, tmp_path, cut, **reports)
    write_report(tmp_path, lambda line: None)
    partial = (tmp_path / "report.md").read_text()
    assert f"{len(two_steps.runs) - 24} are missing" in partial and "the law needs at least" not in partial
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mhc_jax.experiments.runlist.write_report", lambda folder, say: None)
        results = run_list(two_steps, tmp_path, lambda config, folder: calls.append(folder.name) or made(config, folder), **reports)
    assert len(calls) == len(two_steps.runs) + 1 and not results.missing
    write_report(tmp_path, lambda line: None)
    markdown = (tmp_path / "report.md").read_text()
    for text in ("Scaling laws", "N_opt ~ C^", "-0.0210", "arXiv 2512.24880", "beyond", "rule of thumb: 6 N", "at equal compute"):
        assert text in markdown, text
    assert "are missing" not in markdown and "not compared" not in markdown and "outside the sizes |" not in markdown
    for stem in ("law", "isoflop", "gap"):
        assert (tmp_path / "figures" / f"scaling_{stem}.png").read_bytes().startswith(b"\x89PNG")
        assert f"](figures/scaling_{stem}.png)" in markdown
    assert (tmp_path / "report.html").read_text().count("data:image/png;base64,") == 3


def test_the_study_gives_back_law_and_gap(tmp_path, two_steps):
    save_runs(two_steps, tmp_path)
    for run in two_steps.runs:
        made(run.config, tmp_path / "runs" / run.name)
    broken = two_steps.runs[0]
    summary = tmp_path / "runs" / broken.name / "summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"loss": None}))
    results = load_results(tmp_path)
    assert is_scaling(results)
    found, gap = kinds(results, resamples=40), gaps(results, resamples=40)["mhc"]
    assert found["residual"].collected.not_finite == (broken.name,) and not found["mhc"].collected.not_finite
    fit = found["residual"].fit
    assert isinstance(fit, LawFit) and len(fit.drawn) == 40
    assert (fit.law.alpha, fit.law.beta) == pytest.approx((LAW.alpha, LAW.beta), abs=0.05)
    assert gap.points.runs == len(two_steps.runs) // 2 - 1  # without the pair of the broken run
    # mHC has more parameters, so its law at more N is subtracted from the plain residual's.
    pairs = [(run.config, other.config) for run, other in zip(two_steps.runs[::2], two_steps.runs[1::2])][1:]
    expected = [
        GAP + float(LAW.loss(active_parameters(b.model), tokens_of(b)) - LAW.loss(active_parameters(a.model), tokens_of(a)))
        for a, b in pairs
    ]
    assert gap.points.losses[np.isfinite(gap.points.losses)].mean() == pytest.approx(np.mean(expected), abs=2e-3)


def test_a_list_of_one_size_is_no_scaling_study(tmp_path):
    runs = ablation(scaling.sized(SIZES[0], "mhc", BUDGETS[0]))
    save_runs(runs, tmp_path)
    assert not is_scaling(load_results(tmp_path))
