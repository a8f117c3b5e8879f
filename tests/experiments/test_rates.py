"""Learning-rate grids: best rates, edges, comparisons at the best and at one rate, worked out by hand."""

import json

import pytest
from fake_run import fake_train, tiny_config

from mhc_jax.errors import UserError
from mhc_jax.experiments.document import Table, to_markdown
from mhc_jax.experiments.figures import FIGURES, render
from mhc_jax.experiments.findings import findings, warnings
from mhc_jax.experiments.learning_rates import laptop_learning_rates, learning_rates
from mhc_jax.experiments.rates import baseline_curve, curves, gap, rate_blocks, shared_rate
from mhc_jax.experiments.report import report_blocks
from mhc_jax.experiments.results import load_results
from mhc_jax.experiments.runs import run_folder, save_runs

TINY = tiny_config(steps=4, eval_every=2, layers=2)  # at a learning rate of 3e-3
RATES = (1e-3, 3e-3, 9e-3)
LOSSES = {  # kind, rate: of seed 0 and seed 1
    ("residual", 1e-3): (4.2, 4.4),
    ("residual", 3e-3): (4.0, 4.1),
    ("residual", 9e-3): (4.5, None),
    ("mhc", 1e-3): (4.1, 4.1),
    ("mhc", 3e-3): (3.9, 4.0),
    ("mhc", 9e-3): (3.7, 3.9),
}


def results(folder, losses=LOSSES, leave_out=()):
    runs = learning_rates(TINY, ("residual", "mhc"), RATES)
    save_runs(runs, folder)
    for run in runs.runs:
        if run.name in leave_out:
            continue
        fake_train(run.config, run_folder(folder, run))
        path = run_folder(folder, run) / "summary.json"
        loss = losses[run.config.model.residual, run.config.optimizer.learning_rate][run.config.train.seed]
        path.write_text(json.dumps(json.loads(path.read_text()) | {"loss": loss}))
    return load_results(folder)


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    return results(tmp_path_factory.mktemp("grid"))


def test_best_rates_and_gaps(complete):
    residual, mhc = curves(complete)
    assert (residual.name, residual.best) == ("residual", 3e-3) and (mhc.name, mhc.best) == ("mhc", 9e-3)
    assert baseline_curve(complete, [residual, mhc]) is residual
    assert shared_rate([residual, mhc]) == 3e-3  # 4.05 + 3.95; at 9e-3 one of the residual's diverged
    own = gap(mhc, mhc.best, residual, residual.best)
    assert (own.mean, own.spread, own.seeds) == (pytest.approx(-0.25), pytest.approx(0.05 * 2**0.5), 2)
    assert gap(mhc, 9e-3, residual, 9e-3).mean is None  # not finite
    assert gap(mhc, None, residual, 3e-3).seeds == 0


def test_the_report_says_it(complete):
    said, warned = " ".join(findings(complete)), " ".join(warnings(complete))
    assert "`residual` diverged at 0.009." in said
    assert "`residual` is best at a learning rate of 0.003: 4.0500 ± 0.0707 nats over 2 seeds." in said
    assert (
        "Each at its own best rate, `mhc` ends 0.2500 nats below `residual` (2 seeds, clear of twice the standard error of 0.0500)." in said
    )
    assert "Both at 0.003, `mhc` ends 0.1000 nats below `residual`" in said
    assert "ends 0.1000 nats below `residual learning_rate=0.003`" not in said  # once is enough
    assert "The best rate of `mhc`, 0.009, is the highest of its grid" in warned and "rate of `residual`" not in warned
    losses, compared = [block for block in rate_blocks(complete) if isinstance(block, Table)]
    assert losses.rows[0] == ["residual", "4.3000 ± 0.1414", "4.0500 ± 0.0707", "not finite"]
    assert compared.rows[1] == ["mhc", "0.009, at the edge", "3.8000 ± 0.1414", "-0.2500 ± 0.0707", "-0.1000 ± 0.0000"]
    assert "## Learning rates" in to_markdown(report_blocks(complete, []))


def test_the_figure_is_drawn_for_grids_alone(complete):
    (spec,) = [spec for spec in FIGURES if spec.stem == "learning_rates"]
    assert spec.applies(complete) and render(spec, complete).startswith(b"\x89PNG")


def test_a_rate_with_a_missing_seed_is_no_candidate_and_is_told(tmp_path):
    found = results(tmp_path, leave_out=("mhc_learning_rate=0.009-seed1", "residual_learning_rate=0.003-seed0"))
    residual, mhc = curves(found)
    assert (residual.best, mhc.best) == (1e-3, 3e-3)
    assert shared_rate([residual, mhc]) == 1e-3
    warned = " ".join(warnings(found))
    assert "`mhc` has not finished at 0.009" in warned
    assert "The best rate of `residual`, 0.001, is the lowest of its grid" in warned
    assert "3.7000, so far" in to_markdown(rate_blocks(found))


def test_nothing_is_said_of_what_has_not_begun(tmp_path):
    found = results(tmp_path, leave_out=[run.name for run in learning_rates(TINY, ("residual", "mhc"), RATES).runs])
    assert rate_blocks(found) == [] and findings(found) == [] and warnings(found) == []


def test_a_grid_has_an_inside():
    with pytest.raises(UserError, match="2 rates has no inside"):
        learning_rates(TINY, ("mhc",), (1e-3, 2e-3))
    assert learning_rates(TINY, ("mhc", "hc"), (9e-3, 1e-3, 2e-3)).baseline == "mhc learning_rate=0.002"


def test_the_named_grid_has_whole_grids_first():
    runs = laptop_learning_rates()
    assert len(runs.runs) == 24 and {run.config.train.seed for run in runs.runs[:12]} == {0}
    assert runs.baseline == "residual learning_rate=0.0015"
