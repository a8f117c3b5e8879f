"""The engine: what it trains, skips, resumes and refuses, and what stands on disk after each run."""

import json

import pytest
from fake_run import fake_train, tiny_config

from mhc_jax.config import override
from mhc_jax.errors import UserError
from mhc_jax.experiments import runlist
from mhc_jax.experiments.ablation import ablation
from mhc_jax.experiments.runlist import Run, RunList, run_list
from mhc_jax.experiments.runs import load_runs, save_runs
from mhc_jax.files import write_atomically


class Trainer:
    """The fake training, which notes the folders it was called with."""

    def __init__(self, cut: str | None = None):
        self.called: list[str] = []
        self.cut = cut

    def __call__(self, config, folder):
        self.called.append(folder.name)
        return fake_train(config, folder, stop_after=20 if folder.name == self.cut else None)


@pytest.fixture
def without_figures(monkeypatch):
    """The report without its pictures, which the engine has no part in and which take most of the time."""
    monkeypatch.setattr("mhc_jax.experiments.report.FIGURES", ())


def pair(**changes):
    return ablation(override(tiny_config(), changes), kinds=("residual", "mhc"))


@pytest.mark.usefixtures("without_figures")
def test_runs_in_order_and_skips_what_is_finished(tmp_path):
    train, said = Trainer(), list[str]()
    results = run_list(pair(), tmp_path, train, say=said.append)
    assert train.called == ["residual-seed0", "mhc-seed0"]
    assert [record.name for record in results.records] == train.called and not results.missing
    again = Trainer()
    run_list(pair(), tmp_path, again, say=said.append)
    assert again.called == []
    assert sum("skipped" in line for line in said) == 2


@pytest.mark.usefixtures("without_figures")
def test_a_cut_run_is_reported_as_missing_and_resumed(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_list(pair(), tmp_path, Trainer(cut="mhc-seed0"), say=lambda line: None)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["missing"] == ["mhc-seed0"] and list(results["variants"]) == ["residual"]
    train, said = Trainer(), list[str]()
    run_list(pair(), tmp_path, train, say=said.append)
    assert train.called == ["mhc-seed0"]
    assert "mhc-seed0: resumed (2 of 2)" in said
    assert json.loads((tmp_path / "results.json").read_text())["missing"] == []


@pytest.mark.usefixtures("without_figures")
def test_the_report_is_rewritten_after_every_run(tmp_path):
    seen = []

    def train(config, folder):
        seen.append(json.loads((tmp_path / "results.json").read_text())["missing"])
        assert (tmp_path / "report.html").exists() and (tmp_path / "report.md").exists()
        return fake_train(config, folder)

    run_list(pair(), tmp_path, train, say=lambda line: None)
    assert seen == [["residual-seed0", "mhc-seed0"], ["mhc-seed0"]]
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.usefixtures("without_figures")
def test_another_config_in_a_folder_is_refused_before_anything_is_trained(tmp_path):
    fake_train(tiny_config(steps=30), tmp_path / "runs" / "mhc-seed0")
    train = Trainer()
    with pytest.raises(UserError) as error:
        run_list(pair(**{"train.steps": 40}), tmp_path, train, say=lambda line: None)
    assert "train.steps: 30 in the folder, 40 now" in str(error.value)
    assert "--out" in str(error.value) and "delete" in str(error.value)
    assert train.called == [] and not (tmp_path / "runlist.json").exists()


def test_a_summary_without_a_config_is_refused(tmp_path):
    (tmp_path / "runs" / "mhc-seed0").mkdir(parents=True)
    (tmp_path / "runs" / "mhc-seed0" / "summary.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json is missing"):
        run_list(pair(), tmp_path, Trainer(), say=lambda line: None)


@pytest.mark.usefixtures("without_figures")
def test_a_run_that_diverged_does_not_stop_the_list(tmp_path):
    said: list[str] = []
    run_list(pair(), tmp_path, lambda config, folder: fake_train(config, folder) | {"loss": None}, say=said.append)
    assert "mhc-seed0: held-out loss not finite" in said


def test_collisions_are_refused():
    a, b = tiny_config(), tiny_config(steps=50)
    with pytest.raises(UserError, match="two runs are called 'x'"):
        RunList("list", "?", (Run("x", "a", a), Run("x", "b", b)), None)
    with pytest.raises(UserError, match="'x' and 'y' have the same config"):
        RunList("list", "?", (Run("x", "a", a), Run("y", "b", override(a, {"name": "other"}))), None)
    with pytest.raises(UserError, match=r"'x' and 'y' are both of variant 'a', but differ in train\.steps"):
        RunList("list", "?", (Run("x", "a", a), Run("y", "a", b)), None)
    with pytest.raises(UserError, match="baseline 'c' is not a variant"):
        RunList("list", "?", (Run("x", "a", a),), "c")
    with pytest.raises(UserError, match="cannot name a run folder"):
        RunList("list", "?", (Run("../x", "a", a),), None)
    with pytest.raises(UserError, match="holds no runs"):
        RunList("list", "?", (), None)


def test_an_ablation_changes_the_residual_kind_and_the_seed_alone():
    config = override(tiny_config(), {"train.seed": 7})
    runs = ablation(config, seeds=2)
    assert runs.baseline == "residual"
    assert [run.name for run in runs.runs[:4]] == ["residual-seed0", "hc-seed0", "mhc-seed0", "identity_hc-seed0"]
    assert [run.config.train.seed for run in runs.runs] == [7] * 4 + [8] * 4
    for run in runs.runs:
        assert override(run.config, {"model.residual": "mhc", "train.seed": 7}) == config
    assert ablation(config, kinds=("hc", "mhc")).baseline is None
    with pytest.raises(UserError, match="seeds is 0"):
        ablation(config, seeds=0)


def test_a_list_survives_its_file(tmp_path):
    runs = pair()
    save_runs(runs, tmp_path)
    assert load_runs(tmp_path) == runs
    (tmp_path / "runlist.json").write_text('{"name": ')
    with pytest.raises(UserError, match=r"runlist\.json cannot be read"):
        load_runs(tmp_path)
    with pytest.raises(UserError, match="not the folder of a run list"):
        load_runs(tmp_path / "elsewhere")


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"


def test_the_engine_exports_what_a_list_is_made_of():
    assert runlist.Run is Run and runlist.RunList is RunList
