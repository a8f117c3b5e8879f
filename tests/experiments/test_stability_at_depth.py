"""The simulation on mappings whose products are known on paper, and the report of a list."""

from pathlib import Path

import fake_run
import numpy as np
import pytest

from mhc_jax.cli import main
from mhc_jax.config import difference, override
from mhc_jax.configs import get
from mhc_jax.experiments import stability_at_depth
from mhc_jax.experiments.ablation import ablation
from mhc_jax.experiments.formats import significant
from mhc_jax.experiments.runs import Run, RunList, run_folder, save_runs
from mhc_jax.experiments.stability import KINDS, SETTINGS, stability
from mhc_jax.experiments.stability_at_depth import gains_of, resampled
from mhc_jax.experiments.studies import SOURCES
from pallas_kernels.mhc import sinkhorn

PERMUTATION = np.eye(4)[[2, 0, 3, 1]]


def test_permutations_neither_grow_nor_shrink_at_any_depth():
    gains = resampled(np.stack([PERMUTATION, np.eye(4), PERMUTATION.T]), 122, draws=20)
    assert gains.forward.shape == gains.backward.shape == (20, 122)
    assert np.all(gains.forward == 1) and np.all(gains.backward == 1)
    np.testing.assert_allclose(gains.distance_uniform, np.sqrt(3))


@pytest.mark.parametrize("scale", [1.25, 0.5])
def test_a_scaled_permutation_grows_as_a_power_of_the_depth(scale):
    """Forward from the first sublayer up, backward from the last down."""
    gains = resampled(scale * PERMUTATION[None], 60, draws=2)
    powers = scale ** np.arange(1, 61)
    np.testing.assert_allclose(gains.forward, np.tile(powers, (2, 1)))
    np.testing.assert_allclose(gains.backward, np.tile(powers[::-1], (2, 1)))
    forward, backward = gains.largest
    np.testing.assert_allclose([forward, backward], max(powers))


def test_products_are_in_the_order_of_the_network():
    """x' = H x: later sublayers multiply from the left."""
    chain = np.random.default_rng(0).standard_normal((3, 5, 4, 4))
    gains = gains_of(chain)
    for draw, res in enumerate(chain):
        for at in range(5):
            up, down = np.eye(4), np.eye(4)
            for h in res[: at + 1]:
                up = h @ up
            for h in res[at:]:
                down = h @ down
            assert gains.forward[draw, at] == pytest.approx(np.abs(up.sum(axis=1)).max())
            assert gains.backward[draw, at] == pytest.approx(np.abs(down.sum(axis=0)).max())
    assert gains.distance_uniform[0] == pytest.approx(np.linalg.norm(np.linalg.multi_dot(chain[0][::-1]) - 0.25))


def test_draws_are_independent_and_uniform_over_the_pool():
    """The logarithm of a gain is a random walk of steps +-1: mean 0, standard deviation the root of the depth."""
    gains = resampled(np.stack([2 * PERMUTATION, PERMUTATION / 2]), 100, draws=4000)
    walk = np.log2(gains.forward[:, -1])
    assert abs(walk.mean()) < 4 * 10 / np.sqrt(4000)
    assert walk.std() == pytest.approx(10, rel=0.05)
    lag = np.corrcoef(np.log2(gains.forward[:, 50]), walk - np.log2(gains.forward[:, 50]))[0, 1]
    assert abs(lag) < 0.07


def test_doubly_stochastic_pools_stay_bounded_and_tend_to_equal_weights():
    logits = 4 * np.eye(4)[..., None] + np.random.default_rng(0).standard_normal((4, 4, 40))
    pool = np.asarray(sinkhorn(logits.astype(np.float32)), np.float64).transpose(2, 0, 1)
    gains = resampled(pool, 244, draws=200)
    assert np.abs(gains.forward - 1).max() < 1e-4
    assert gains.backward.max() <= 4
    assert np.median(gains.distance_uniform) < np.median(resampled(pool, 10, draws=200).distance_uniform) / 10


def test_the_report_of_a_list(tmp_path, capsys):
    shallow = ablation(fake_run.tiny_config(layers=6), kinds=("residual", "hc", "mhc"), seeds=2)
    deep = Run("deep", "deep hc", override(shallow.first("hc").config, {"model.num_layers": 9}))
    runs = RunList("depths", "?", (*shallow.runs, deep), "residual")
    source, out = tmp_path / "list", tmp_path / "out"
    save_runs(runs, source)
    for run in runs.runs:
        Path(run_folder(source, run)).mkdir(parents=True)
        fake_run.fake_train(run.config, run_folder(source, run))
    assert main(["study", "stability_at_depth", "--source", str(source), "--out", str(out)]) == 0
    report = (out / "report.md").read_text()
    assert (out / "figures" / "gains.png").read_bytes().startswith(b"\x89PNG") and "figures/gains.png" in report
    for depth in ("12 (as trained)", "60 (the mHC paper's 27B)", "122 (DeepSeek-V3, `moe_1t`)", "244 (twice that)"):
        assert f"| hc: {depth} |" in report and f"| mhc: {depth} |" in report
    assert "residual:" not in report
    row = next(line for line in report.splitlines() if line.startswith("| mhc: 122"))
    assert [cell.strip() for cell in row.split("|")[2:6:2]] == ["1.00 (1.00 to 1.00)", "1.000"]
    with np.load(run_folder(source, deep) / "stability" / "00000040.npz") as arrays:
        measured = significant(arrays["gain_forward_composite"].max())
    held = [line for line in report.splitlines() if "drawn for" in line and line.startswith("|")]
    assert len(held) == 1 and held[0].startswith("| hc, drawn for 18 sublayers |") and held[0].split("|")[3].strip() == measured


def test_a_study_without_runs_says_what_is_missing(tmp_path, capsys):
    assert main(["study", "stability_at_depth", "--source", str(tmp_path)]) == 2
    assert "is not the folder of a run list" in capsys.readouterr().err
    assert main(["study", "economics", "--source", str(tmp_path)]) == 2
    assert "economics reads no runs" in capsys.readouterr().err
    runs = ablation(fake_run.tiny_config(), kinds=("residual", "mhc"))
    save_runs(runs, tmp_path)
    assert main(["study", "stability_at_depth", "--source", str(tmp_path)]) == 2
    assert "no finished run with several streams" in capsys.readouterr().err


def test_every_run_of_the_list_is_depth30_at_another_depth_or_width():
    runs = stability().runs
    assert len(runs) == len(KINDS) * len(SETTINGS)
    common = {"name", "train.steps", "train.checkpoint_every", "train.eval_every", "train.eval_sequences", "model.residual"}
    for run in runs:
        m = run.config.model
        assert set(difference(get("depth30"), run.config)) - common <= (
            {"model.num_layers"} if m.dim == 64 else {"model.dim", "model.dense_dim", "model.moe.expert_dim"}
        )
        assert (m.dense_dim, m.moe.expert_dim) == (3 * m.dim, m.dim)
    assert 2 * max(run.config.model.num_layers for run in runs) == 2 * get("moe_1t").model.num_layers == 122
    assert {stability_at_depth.NAME: stability().name} == SOURCES
