"""`mhc-jax study`: every study by its name, and a report that stands."""

import json
import struct

import numpy as np
import pytest
from matplotlib.figure import Figure

from mhc_jax.cli import main
from mhc_jax.experiments import attention_memory, attention_modelled, sparse_attention_cost
from mhc_jax.experiments.attention_memory import LAYERS
from mhc_jax.experiments.attention_modelled import MODELLED
from mhc_jax.experiments.figures_depth import heat_map
from mhc_jax.experiments.study import to_png


@pytest.mark.parametrize(
    ("args", "message"),
    [([], "name a study"), (["--out", "x"], "name a study"), (["cots"], "there is no study 'cots'; the studies are sparse_attention_cost")],
)
def test_a_study_must_be_named(args, message, capsys):
    assert main(["study", *args]) == 2
    assert message in capsys.readouterr().err


def test_the_cost_report_from_kept_figures(tmp_path, monkeypatch):
    us = {program.key: {"us": 100.0 * program.queries, "problems": []} for program in MODELLED.programs}
    us["pages/s512_t32768_h128"] = {"problems": ["the compiler refuses it"]}
    (tmp_path / "modelled.json").write_text(json.dumps({"v6e:2x2": us}))
    (tmp_path / "memory.json").write_text(json.dumps({"v6e:2x2": {layer.key: 5 << 20 for layer in LAYERS}}))

    def missing():
        raise ValueError("there is no compiler")

    for module in (attention_modelled, attention_memory):
        monkeypatch.setattr(module, "check_libtpu", missing)
    said: list[str] = []
    sparse_attention_cost.run(tmp_path, "mhc-jax study sparse_attention_cost", said.append)
    report = (tmp_path / "report.md").read_text()
    assert "| 128K | 703.7 | 74.2 | 144.4 | 3.22 | 268M of 1,152 bytes |" in report
    assert "| the same, published dollars | 10K | 4.8K |" in report
    assert "v6e, pages/s512_t32768_h128: the compiler refuses it" in report
    assert "| pages, 128K queries of 128K keys | 5 MiB |" in report
    for name in ("counted", "published", "modelled"):
        assert (tmp_path / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"figures/{name}.png" in report
    assert "nothing is modelled: there is no compiler" in said and said[-1] == f"report: {tmp_path / 'report.html'}"


def test_a_figure_is_as_large_as_is_asked_for():
    def width(png: bytes) -> int:
        return struct.unpack(">I", png[16:20])[0]

    assert width(to_png(lambda: Figure(figsize=(2, 1)), dpi=50)) == 100
    assert width(to_png(lambda: Figure(figsize=(2, 1)))) == 260  # the style's 130 dots an inch


def test_a_matrix_is_drawn_with_its_entries_and_sums():
    axes = Figure().subplots()
    heat_map(axes, np.array([[0.75, -0.5], [0.001, 20.0]]), "H")
    assert [text.get_text() for text in axes.texts] == ["0.75", "-0.50", "0.00", "20.0"]
    assert axes.get_xlabel() == "row sums up to 20.0\ncolumn sums up to 19.5"
