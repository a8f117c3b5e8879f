"""Reports of runs with Engram: the curve over the share of experts, the use of the tables, the gates; and how tables' use is counted."""

import dataclasses
import json

import numpy as np
import pytest
from fake_run import fake_train, tiny_config
from ngrams_made import made

from mhc_jax.config import override
from mhc_jax.engram_config import EngramConfig
from mhc_jax.errors import UserError
from mhc_jax.experiments.figures_memory import token_label
from mhc_jax.experiments.memory_records import FILE, MemoryStudy, TableUse, load_study
from mhc_jax.experiments.memory_study import studied, table_use
from mhc_jax.experiments.report import write_report
from mhc_jax.experiments.runs import Run, RunList, save_runs

SMALL = EngramConfig(layers=(1,), table_sizes=(101, 103), heads=2, head_dim=4)
STUDY = MemoryStudy((TableUse(1, 2, 204, 0.9, 300, 0.8),), ("the", " $x", "\n"), ((0.2, 0.9, 0.4),))


def quiet(line):
    pass


@pytest.mark.slow
def test_the_report_of_an_allocation_sweep(tmp_path):
    larger = dataclasses.replace(SMALL, table_sizes=(401, 403))
    variants = {"rho 1": {}, "some": {"model.moe.num_experts": 3, "model.engram": SMALL}, "more": {"model.engram": larger}}
    runs = tuple(
        Run(f"{name.replace(' ', '_')}-{seed}", name, override(tiny_config(), {**changes, "train.seed": seed}))
        for seed in range(2)
        for name, changes in variants.items()
    )
    save_runs(RunList("sweep", "Which share?", runs, "rho 1"), tmp_path)
    for run in runs:
        fake_train(run.config, tmp_path / "runs" / run.name)
        if run.config.model.engram is not None:
            (tmp_path / "runs" / run.name / FILE).write_text(json.dumps(dataclasses.asdict(STUDY)))
    write_report(tmp_path, quiet)
    markdown = (tmp_path / "report.md").read_text()
    for text in ("Loss over the share of experts", "Gates over a text", "rows that training read", "2608.30320", "80.0 % of 300"):
        assert text in markdown
    for stem in ("allocation", "gates"):
        assert (tmp_path / "figures" / f"{stem}.png").read_bytes().startswith(b"\x89PNG")


def test_a_damaged_study_is_refused(tmp_path):
    (tmp_path / FILE).write_text('{"tables": []}')
    with pytest.raises(UserError, match=r"memory\.json is damaged"):
        load_study(tmp_path)
    assert load_study(tmp_path / "none") is None


def test_runs_without_memory_are_not_studied(tmp_path):
    assert studied(lambda config, folder: {"loss": 1.0})(tiny_config(), tmp_path) == {"loss": 1.0}
    assert not list(tmp_path.iterdir())


def test_table_use_counts_rows_and_shared_rows():
    """Four n-grams of order 2: the first two share a row in the first head, all are apart in the second."""
    artifact = made(SMALL, 50)
    order2, order3 = [[0, 110], [0, 111], [5, 112], [6, 113], [6, 113]], [[300, 350]] * 5
    rows = np.array([[a + b] for a, b in zip(order2, order3)], np.int32)
    second, third = table_use(rows, artifact)
    size = int(artifact.primes[0, 0].sum())
    assert second == TableUse(1, 2, size, round((3 + 4) / size, 4), 4, round(1 - (2 + 4) / 2 / 4, 4))
    assert third.ngrams == 1 and third.colliding == 0


def test_labels_of_tokens_show_white_space_and_are_short():
    assert [token_label(token) for token in (" a", "\n\t", "$x", "abcdefghi", "abcdefghij")] == [
        "␣a",
        "↵⇥",
        r"\$x",
        "abcdefghi",
        "abcdefgh…",
    ]
