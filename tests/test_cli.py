"""The command line: one message for what a user can put right, and every command from end to end."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import pytest

from mhc_jax.cli import COMMANDS, main
from mhc_jax.cli.options import Train, with_config
from mhc_jax.config import override
from mhc_jax.configs import get
from mhc_jax.engram_config import EngramConfig
from mhc_jax.errors import UserError

TINY_FIELDS = {
    "--model.num-layers": 2,
    "--model.dim": 16,
    "--model.dense-dim": 16,
    "--model.vocab-size": 280,
    "--model.attention.num-heads": 2,
    "--model.attention.kv-rank": 8,
    "--model.attention.nope-dim": 4,
    "--model.attention.rope-dim": 4,
    "--model.attention.value-dim": 4,
    "--model.moe.num-experts": 4,
    "--model.moe.expert-dim": 8,
    "--data.seq-len": 16,
    "--data.heldout-share": 0.3,
    "--train.batch-size": 4,
    "--train.eval-sequences": 4,
    "--steps": 4,
    "--train.eval-every": 2,
    "--train.checkpoint-every": 2,
}
TINY = [word for flag, value in TINY_FIELDS.items() for word in (flag, str(value))]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MHC_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(10):
        (folder / f"{i}.txt").write_text(f"{i} streams and rows that sum to one. " * 20)
    return f"{folder}/*.txt"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["trian"], "there is no command 'trian'; the commands are train, ablate"),
        (["train"], "name a config: mhc-jax train NAME"),
        (["train", "latpop"], "there is no config 'latpop'; choose one of laptop, depth30, 3b"),
        (["train", "laptop", "--model.moe.top-k", "9"], "model.moe.top_k is 9"),
        (["train", "laptop", "--model.attention.rope-dim", "7"], "does not divide model.attention.rope_dim = 7"),
        (["train", "laptop", "--mesh.fsdp", "8", "--model.moe.expert-dim", "12"], "mesh.fsdp is 8, which does not divide model.moe.exp"),
        (["train", "laptop", "--mesh.data", "1024", "--train.batch-size", "1024", "--train.eval-sequences", "1024"],
         "asks for 1024 devices"),
        (["train", "laptop", "--data.source", "nowhere/*.txt"], "nowhere/*.txt"),
        (["train", "laptop", "--data.tokenizer", "none.json"], "none.json"),
        (["ablate", "laptop", "--variants", "residual", "mch"], "there is no residual kind 'mch'"),
        (["report", "nowhere"], "nowhere"),
        (["generate", "nowhere", "--prompt", "x"], "there is no run in nowhere"),
        (["bench", "laptop", "--decode", "64"], "compares sparse attention with dense, but laptop is dense"),
        (["bench", "dsa_laptop", "--decode", "0"], "--decode is 0"),
        (["ngrams", "--threads", "0"], "--threads is 0; it must be 1 to 1024"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_message_and_status_2(args, message, capsys):
    assert main(args) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(("args", "message"), [(["--model.dmi", "3"], "--model.dmi"), (["--model.dim", "many"], "many")])
def test_what_the_parser_refuses_exits_with_2(args, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "laptop", *args])
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.out + captured.err


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="there is no config"):
        main(["train", "latpop", "--debug"])


@pytest.mark.parametrize(("command", "goes_on"), [("train", True), ("ablate", True), ("study", True), ("generate", False), ("data", False)])
@pytest.mark.parametrize(("stopped", "status"), [(KeyboardInterrupt(), 130), (signal.SIGTERM, 143)])
def test_a_stopped_command_says_that_it_goes_on_only_where_it_does(command, goes_on, stopped, status, monkeypatch, capsys):
    def run(args):
        if isinstance(stopped, BaseException):
            raise stopped
        os.kill(os.getpid(), stopped)

    monkeypatch.setitem(COMMANDS, command, dataclasses.replace(COMMANDS[command], run=run))
    assert main([command]) == status
    assert ("the same command goes on" in capsys.readouterr().err) == goes_on


def test_help_names_commands_and_configs(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for word in ("train", "ablate", "report", "data", "bench", "laptop", "27b"):
        assert word in out


def test_train_then_again(text, tmp_path, capsys):
    args = ["train", "laptop", "--residual", "hc", "--data.source", text, "--out", str(tmp_path / "run"), *TINY]
    assert main(args) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["residual"] == "hc"
    assert summary["steps"] == 4
    assert main(args) == 0  # finished before: returns at once
    assert main([*args, "--seed", "5"]) == 2
    assert "train.seed: 0 in the folder, 5 now" in capsys.readouterr().err


def test_ablate_writes_a_report_that_report_redraws(text, tmp_path):
    folder = tmp_path / "list"
    assert main(["ablate", "laptop", "--variants", "residual", "mhc", "--data.source", text, "--out", str(folder), *TINY]) == 0
    results = json.loads((folder / "results.json").read_text())
    assert set(results["variants"]) == {"residual", "mhc"}
    assert not results["missing"]
    before = (folder / "report.md").read_text()
    assert "--variants residual mhc" in before  # the command that made it
    (folder / "report.html").unlink()
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.md").read_text() == before
    assert (folder / "report.html").exists()


def test_a_refused_config_does_not_claim_the_folder(text, tmp_path):
    args = ["train", "laptop", "--out", str(tmp_path / "run"), *TINY]
    assert main([*args, "--data.source", "nowhere/*.txt"]) == 2
    assert not (tmp_path / "run").exists()
    assert main([*args, "--data.source", text]) == 0


def test_data_prints_where_the_tokens_are(text, capsys):
    assert main(["data", "laptop", "--data.source", text, "--model.vocab-size", "280"]) == 0
    assert "train" in capsys.readouterr().out


@pytest.mark.slow
def test_a_weighted_mixture_trains_and_reports_each_source(text, tmp_path):
    (tmp_path / "more.jsonl").write_text(
        "".join(json.dumps({"content": f"{i} mixes four rows. " * 20}) + "\n" for i in range(20)) + "oops\n"
    )
    options = ["--data.source", text, str(tmp_path / "more.jsonl"), "--data.weights", "1", "3", "--data.text-field", "content"]
    assert main(["train", "laptop", "--out", str(tmp_path / "run"), *options, *TINY]) == 0
    data = json.loads((tmp_path / "run" / "summary.json").read_text())["data"]
    assert [source["share"] for source in data["sources"]] == [0.25, 0.75]
    assert data["sources"][1]["skipped_records"] == {"not JSON": 1}
    assert data["skipped_records"] == 1


@pytest.mark.slow
def test_bench_compares_step_times(capsys):
    assert main(["bench", "laptop", "--rounds", "1", "--variants", "residual", "mhc", *TINY]) == 0
    assert "| mhc |" in capsys.readouterr().out


def test_bench_compares_decoding(capsys):
    sparse = ["--model.attention.sparse.top-k", "8", "--model.attention.sparse.index-heads", "2"]
    assert main(["bench", "dsa_laptop", "--decode", "20", "--rounds", "1", *TINY, *sparse]) == 0
    out = capsys.readouterr().out
    assert "| dense |" in out and "| sparse |" in out and "after 20" in out


def test_the_command_is_installed():
    done = subprocess.run([sys.executable, "-m", "mhc_jax.cli", "--version"], capture_output=True, text=True, check=False)
    assert done.returncode == 0


def test_ngrams_prints_a_line_for_each_published_size(capsys):
    assert main(["ngrams", "--rounds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:4] for line in lines[1:]] == [
        ["27b", "2,3", "8", "16"],
        ["40b", "2,3", "8", "16"],
        ["v4.1-flash", "2,3,4", "8", "24"],
    ]
    assert all(float(line.split()[4]) >= float(line.split()[5]) for line in lines[1:])


def test_a_config_with_engram_has_flags_for_it_and_others_have_not(monkeypatch, capsys):
    plain = get("laptop")
    engram = EngramConfig(layers=(1,), table_sizes=(100, 200))
    monkeypatch.setattr("mhc_jax.configs.CONFIGS", {"plain": lambda: plain, "engram": lambda: override(plain, {"model.engram": engram})})
    changed = with_config(Train, "train", ["engram", "--model.engram.seed", "3", "--model.engram.table-sizes", "300", "400"])
    assert changed.config == override(plain, {"model.engram": dataclasses.replace(engram, seed=3, table_sizes=(300, 400))})
    assert with_config(Train, "train", ["plain"]).config == plain
    with pytest.raises(SystemExit):
        with_config(Train, "train", ["plain", "--model.engram.seed", "3"])
    with pytest.raises(UserError, match=r"model\.engram\.heads is 0"):
        with_config(Train, "train", ["engram", "--model.engram.heads", "0"])
