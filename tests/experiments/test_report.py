"""What a report must contain, what it must never contain, and lists that are not a complete ablation."""

import dataclasses
import json
import re

import pytest
from fake_run import fake_train, tiny_config

from mhc_jax.config import override
from mhc_jax.experiments.ablation import ablation
from mhc_jax.experiments.document import Block, Code, Heading, Items, Paragraph, Table, to_html, to_markdown
from mhc_jax.experiments.figures import FIGURES, render
from mhc_jax.experiments.findings import findings
from mhc_jax.experiments.report import write_report
from mhc_jax.experiments.results import load_results
from mhc_jax.experiments.runs import Run, RunList, save_runs
from mhc_jax.experiments.sweeps import field, sweep

EXTERNAL = re.compile(r"""(src|href)\s*=\s*(?!"data:)|url\(|<script|@import|<link""")


ABLATION = [spec for spec in FIGURES if spec.stem not in ("learning_rates", "allocation", "gates")]  # figures of a complete ablation


def quiet(line):
    pass


def write_list(folder, runs, leave_out=(), change=None):
    save_runs(runs, folder)
    for run in runs.runs:
        if run.name not in leave_out:
            path = folder / "runs" / run.name
            fake_train(run.config, path)
            if change:
                summary = json.loads((path / "summary.json").read_text())
                (path / "summary.json").write_text(json.dumps(summary | change.get(run.name, {})))


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """An ablation of four variants with two seeds, reported with all figures."""
    folder = tmp_path_factory.mktemp("complete")
    runs = ablation(tiny_config(), seeds=2)
    write_list(folder, RunList(runs.name, runs.question, runs.runs, runs.baseline, command="mhc-jax ablate tiny --seeds 2"))
    write_report(folder, quiet)
    return folder


def test_a_complete_report_holds_everything(complete):
    html, markdown = (complete / "report.html").read_text(), (complete / "report.md").read_text()
    for text in (
        "Does the way in which sublayers are joined",
        "mhc-jax ablate tiny --seeds 2",
        "train.batch_size = 4",
        "0123456789abcdef",
        "no token was seen twice",
        "4,096",
        "0.10.2",
        "5.9000",
        "300 MiB",
        "24,000",
        "+90.0 %",
        "arXiv 2512.24880, 27B parameters, 262B tokens",
        "-0.021 (stated in the paper)",
        "about -0.016 (read off a figure)",
        "about 3000",
        "about 1.6",
        "6.7 %",
        "standard error",
        "No run had a loss spike.",
    ):
        assert text in html, text
        assert text in markdown, text
    assert "One seed" not in html and "partial" not in html
    assert "skipped" not in markdown and "roll-back" not in markdown


def test_a_complete_report_draws_every_figure(complete):
    markdown = (complete / "report.md").read_text()
    for spec in ABLATION:
        assert (complete / "figures" / f"{spec.stem}.png").read_bytes().startswith(b"\x89PNG")
        assert f"](figures/{spec.stem}.png)" in markdown
        assert spec.reading in markdown
    assert (complete / "report.html").read_text().count("data:image/png;base64,") == len(ABLATION)


def test_steps_that_were_skipped_and_roll_backs_are_told(tmp_path):
    runs = ablation(tiny_config(), kinds=("residual", "mhc"))
    write_list(tmp_path, runs, change={"mhc-seed0": {"skipped_steps": 3, "rollbacks": 1}})
    text = " ".join(findings(load_results(tmp_path)))
    assert "changed nothing: `mhc-seed0` (3)." in text and "left data out: `mhc-seed0` (1)." in text


def test_the_html_needs_nothing_but_itself(complete):
    html = (complete / "report.html").read_text()
    assert not EXTERNAL.search(html)
    assert "http:" not in html and "https:" not in html and "file:" not in html and str(complete) not in html
    assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html


def test_a_list_without_a_finished_run_says_so(tmp_path):
    write_list(tmp_path, ablation(tiny_config()), leave_out=[f"{kind}-seed0" for kind in ("residual", "hc", "mhc", "identity_hc")])
    write_report(tmp_path, quiet)
    markdown = (tmp_path / "report.md").read_text()
    assert "0 of 4 runs have finished" in markdown and "`hc-seed0`: not started" in markdown
    assert "Findings" not in markdown and not (tmp_path / "figures").exists()


def test_a_half_finished_run_is_listed_and_nothing_is_said_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr("mhc_jax.experiments.report.FIGURES", ())
    runs = ablation(tiny_config(), kinds=("residual", "mhc"))
    write_list(tmp_path, runs, leave_out=["mhc-seed0"])
    with pytest.raises(KeyboardInterrupt):
        fake_train(runs.runs[1].config, tmp_path / "runs" / "mhc-seed0", stop_after=25)
    write_report(tmp_path, quiet)
    markdown = (tmp_path / "report.md").read_text()
    assert "`mhc-seed0`: stopped after step 25 of 40" in markdown
    assert "1 of 2 runs have finished" in markdown
    assert "| mhc: loss gap to `residual` (nats) | -0.021 (stated in the paper) | not measured |" in markdown
    assert "mhc" not in json.loads((tmp_path / "results.json").read_text())["variants"]


def test_one_seed_and_a_loss_to_the_baseline_are_said_plainly(tmp_path, monkeypatch):
    monkeypatch.setattr("mhc_jax.experiments.report.FIGURES", ())
    change = {
        "residual-seed0": {"loss": 3.9},
        "mhc-seed0": {"loss": 3.95},
        "hc-seed0": {"loss": 6.0, "loss_spikes": 2, "skipped_steps": 7, "rollbacks": 1},
    }
    write_list(tmp_path, ablation(tiny_config(), kinds=("residual", "hc", "mhc")), change=change)
    write_report(tmp_path, quiet)
    markdown = (tmp_path / "report.md").read_text()
    assert "gaps of a few hundredths of a nat are noise" in markdown
    assert "`residual` has the lowest held-out loss, 3.9000 nats." in markdown
    assert "`mhc` ends 0.0500 nats above `residual`: here it loses to `residual`" in markdown
    assert "| mhc | 1 | 3.9500 | +0.0500 (one seed) |" in markdown
    assert "Loss spikes: `hc-seed0` (2)." in markdown
    assert "changed nothing: `hc-seed0` (7)." in markdown
    assert "left data out: `hc-seed0` (1)." in markdown
    assert "| skipped steps a run | roll-backs a run |" in markdown
    assert "`hc` did not get below the unigram entropy" in markdown
    assert "The composite gain of `mhc` stayed at or below 1.00 forward" in markdown


def test_runs_that_cannot_be_compared_are_pointed_out(tmp_path, monkeypatch):
    monkeypatch.setattr("mhc_jax.experiments.report.FIGURES", ())
    data = {"fingerprint": "other", "source": "x", "train_tokens": 10, "heldout_tokens": 5, "unique_tokens": 10, "epochs": 3.0}
    change = {
        "mhc-seed0": {"data": data | {"vocab_size": 10, "tokenizer": "t"}},
        "hc-seed0": {"loss": None, "gain_forward_max": None, "gain_backward_max": None},
    }
    write_list(tmp_path, ablation(tiny_config(), kinds=("residual", "mhc", "hc")), change=change)
    write_report(tmp_path, quiet)
    markdown = (tmp_path / "report.md").read_text()
    assert "corpus fingerprints differ" in markdown and "different tokenizers" in markdown
    assert "Training tokens were repeated (up to 3.00 passes)" in markdown
    assert "The held-out loss of `hc` is not finite" in markdown
    assert "The composite gain of `hc` did not stay finite." in markdown


def test_a_long_list_shows_the_lowest_losses_and_its_tables_all(tmp_path, monkeypatch):
    drawn = []
    spec = dataclasses.replace(FIGURES[0], draw=lambda results: drawn.append(results.variants) or FIGURES[0].draw(results))
    monkeypatch.setattr("mhc_jax.experiments.report.FIGURES", (spec,))
    base = tiny_config(steps=4, eval_every=2, layers=2)
    runs = sweep("long", "?", base, field("model.dense_dim", *range(64, 64 + 24 * 8, 8)), baseline={"model.dense_dim": 64})
    losses = {run.name: {"loss": 5.0 - number / 10 if number else None} for number, run in enumerate(runs.runs)}
    write_list(tmp_path, runs, change=losses)
    write_report(tmp_path, quiet)
    assert [variant.name for variant in drawn[0]] == [f"dense_dim={size}" for size in (64, *range(96, 64 + 24 * 8, 8))]
    markdown = (tmp_path / "report.md").read_text()
    assert "of the 20 variants with the lowest loss and the baseline; the tables hold all" in markdown
    assert "| dense_dim=72 | 1 | 4.9000 |" in markdown
    assert len(load_results(tmp_path).variants) == 24


def test_a_sweep_without_a_baseline(tmp_path):
    rates = (1e-3, 2e-3)
    runs = tuple(Run(f"lr{rate:g}", f"lr {rate:g}", override(tiny_config(), {"optimizer.learning_rate": rate})) for rate in rates)
    write_list(tmp_path, RunList("sweep", "Which rate?", runs, None))
    write_report(tmp_path, quiet)
    markdown = (tmp_path / "report.md").read_text()
    assert "| lr 0.002 | 0.002 |" in markdown and "optimizer.learning_rate" in markdown
    assert "| gap to" not in markdown and "overhead over" not in markdown
    assert "| mhc: loss gap to `residual` (nats) | -0.021 (stated in the paper) | lr 0.001: –; lr 0.002: – |" in markdown


def test_figures_of_a_diverged_run_can_be_drawn(tmp_path):
    runs = ablation(tiny_config(), kinds=("residual", "mhc"))
    write_list(tmp_path, runs)
    metrics = tmp_path / "runs" / "mhc-seed0" / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    broken = [row | dict.fromkeys(("loss", "grad_norm", "gain_forward") & row.keys()) if row["step"] > 15 else row for row in rows]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in broken))
    results = load_results(tmp_path)
    for spec in FIGURES[:5]:
        assert render(spec, results).startswith(b"\x89PNG")


def test_a_list_of_plain_residuals_draws_no_stream_figures(tmp_path):
    write_list(tmp_path, ablation(tiny_config(), kinds=("residual",)))
    results = load_results(tmp_path)
    stems = [spec.stem for spec in FIGURES if spec.applies(results)]
    assert stems == ["loss", "gradient_norm", "attention_logit", "gain_over_depth", "gain_over_time"]


def test_bounded_variants_have_their_own_figure_only_beside_one_that_is_not(complete, tmp_path):
    stems = [spec.stem for spec in FIGURES if spec.applies(load_results(complete))]
    assert "bounded_gain" in stems
    write_list(tmp_path, ablation(tiny_config(), kinds=("mhc", "identity_hc")))
    assert "bounded_gain" not in [spec.stem for spec in FIGURES if spec.applies(load_results(tmp_path))]


def test_renderings_escape_what_they_are_given():
    blocks: list[Block] = [
        Heading("a < b"),
        Paragraph("use `x<y` & z"),
        Items(["one"]),
        Table(["a", "b"], [["p|q", "1"]]),
        Code("a = <b>\n"),
    ]
    html = to_html("<t>", blocks)
    assert "<title>&lt;t&gt;</title>" in html and "<h2>a &lt; b</h2>" in html
    assert "<p>use <code>x&lt;y</code> &amp; z</p>" in html and "<pre><code>a = &lt;b&gt;</code></pre>" in html
    assert "| p\\|q | 1 |" in to_markdown(blocks)
