"""`mhc-jax study`: every study by its name, and a report that stands."""

import pytest

from mhc_jax.cli import main
from mhc_jax.experiments import sparse_attention_cost


@pytest.mark.parametrize(
    ("args", "message"),
    [([], "name a study"), (["--out", "x"], "name a study"), (["cots"], "there is no study 'cots'; the studies are sparse_attention_cost")],
)
def test_a_study_must_be_named(args, message, capsys):
    assert main(["study", *args]) == 2
    assert message in capsys.readouterr().err


def test_the_counted_part_of_the_cost_report(tmp_path):
    said: list[str] = []
    sparse_attention_cost.run(tmp_path, "mhc-jax study sparse_attention_cost", said.append)
    report = (tmp_path / "report.md").read_text()
    assert "| 128K | 703.7 | 74.2 | 144.4 | 3.22 | 268M of 1,152 bytes |" in report
    assert "| the same, published dollars | 10K | 4.8K |" in report
    for name in ("counted", "published"):
        assert (tmp_path / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"figures/{name}.png" in report
    assert said == [f"report: {tmp_path / 'report.html'}"]
