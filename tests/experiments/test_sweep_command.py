"""`mhc-jax sweep` and what `report` says of its runs, with a stand-in for training; and the example of docs/sweeps.md."""

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from fake_run import fake_train

from mhc_jax.cli import main
from mhc_jax.experiments.runs import load_runs
from mhc_jax.train import loop

DOCUMENT = Path(__file__).parents[2] / "docs" / "sweeps.md"
TINY = """
from fake_run import tiny_config
from mhc_jax.experiments import sweeps

def sweep():
    base = tiny_config(steps=4, eval_every=2, layers=2)
    points = sweeps.product(
        sweeps.field("train.seed", 0, 1), sweeps.field("model.residual", "residual", "mhc"), sweeps.field("data.heldout_share", 0.1, 0.2)
    )
    return sweeps.sweep("mine", "?", base, points, baseline={"model.residual": "residual", "data.heldout_share": 0.1})
"""


@pytest.fixture(autouse=True)
def stand_in(tmp_path, monkeypatch):
    """Training that takes milliseconds, and no pictures; the file mine.py lies in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "train", lambda config, folder, **_: fake_train(config, folder))
    monkeypatch.setattr("mhc_jax.cli.jax_setup.prepare_jax", lambda: None)
    monkeypatch.setattr("mhc_jax.experiments.report.FIGURES", ())
    Path("mine.py").write_text(TINY)


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_sweep_runs_reports_and_is_not_repeated(capsys):
    assert main(["sweep", "mine.py"]) == 0
    results = json.loads(Path("runs/mine/results.json").read_text())
    assert len(results["variants"]) == 4 and not results["missing"]
    assert "mhc-jax sweep mine.py" in Path("runs/mine/report.md").read_text()
    assert main(["sweep", "runs/mine"]) == 0  # the same list from its folder
    assert capsys.readouterr().out.count("skipped") == 8
    assert "mhc-jax sweep mine.py" in Path("runs/mine/report.md").read_text()


def test_only_writes_nothing_but_the_folders_of_its_runs(tmp_path, capsys):
    assert main(["sweep", "mine.py", "--launch", "slurm"]) == 0
    before = files(tmp_path)
    assert main(["sweep", "runs/mine", "--only", "3", "mhc_heldout_share=0.2-seed1"]) == 0
    after = files(tmp_path)
    assert {path: after[path] for path in before} == before
    new = {path.relative_to(tmp_path / "runs/mine/runs").parts[0] for path in after.keys() - before.keys()}
    assert new == {"mhc_heldout_share=0.1-seed0", "mhc_heldout_share=0.2-seed1"}
    assert main(["sweep", "mine.py", "--only", "3"]) == 0  # from the file as well, while it says the same
    assert "finished before, skipped" in capsys.readouterr().out
    Path("mine.py").write_text(TINY.replace("steps=4", "steps=6"))
    assert main(["sweep", "mine.py", "--only", "4"]) == 2
    assert "an earlier form of this sweep" in capsys.readouterr().err


def test_report_shows_what_is_there_and_leaves_the_rest_empty(tmp_path, capsys):
    assert main(["sweep", "mine.py", "--launch", "slurm"]) == 0
    assert main(["sweep", "runs/mine", "--only", "1", "3", "4", "5"]) == 0
    runs = Path("runs/mine/runs")
    with pytest.raises(KeyboardInterrupt):
        fake_train(load_runs(tmp_path / "runs/mine").runs[1].config, runs / "residual_heldout_share=0.2-seed0", stop_after=3)
    diverged = runs / "mhc_heldout_share=0.2-seed0/summary.json"
    diverged.write_text(json.dumps(json.loads(diverged.read_text()) | {"loss": None}))
    capsys.readouterr()
    assert main(["report", "mine.py", "--csv", "a.csv", "--parquet", "a.parquet"]) == 0
    out = capsys.readouterr().out
    assert "8 runs: 4 finished, 1 unfinished, 3 not started" in out
    assert re.search(r"residual_heldout_share=0\.2-seed0 .* unfinished +3/4\n", out)
    rows = list(csv.DictReader(Path("a.csv").read_text().splitlines()))
    losses = {name: json.loads((runs / name / "summary.json").read_text())["loss"] for name in (rows[0]["run"], rows[2]["run"])}
    assert float(rows[0]["loss"]) == losses[rows[0]["run"]] and float(rows[0]["gap"]) == 0
    assert float(rows[2]["gap"]) == pytest.approx(losses[rows[2]["run"]] - losses[rows[0]["run"]])
    assert (rows[1]["loss"], rows[1]["gap"], rows[1]["steps_done"], rows[1]["state"]) == ("", "", "3", "unfinished")
    assert (rows[3]["loss"], rows[3]["gap"]) == ("nan", "nan") and rows[7]["steps_done"] == "0"
    assert [row["data.heldout_share"] for row in rows] == ["0.1", "0.2"] * 4
    table = pq.read_table("a.parquet").to_pydict()
    assert list(table) == list(rows[0]) and table["train.seed"] == [0] * 4 + [1] * 4
    assert table["loss"][1] is None and table["loss"][3] != table["loss"][3]


def test_a_damaged_run_is_named_and_has_empty_cells(capsys):
    assert main(["sweep", "mine.py"]) == 0
    metrics = Path("runs/mine/runs/mhc_heldout_share=0.1-seed0/metrics.jsonl")
    metrics.write_text(metrics.read_text()[:-5])
    before = Path("runs/mine/results.json").read_bytes()
    capsys.readouterr()
    assert main(["report", "runs/mine", "--csv", "a.csv"]) == 2
    said = capsys.readouterr()
    assert "mhc_heldout_share=0.1-seed0 is unusable: " in said.out and "7 finished, 1 unusable" in said.out
    assert "metrics.jsonl, line 7 is half-written" in said.err and "Traceback" not in said.err
    (row,) = [row for row in csv.DictReader(Path("a.csv").read_text().splitlines()) if row["state"] == "unusable"]
    assert row["loss"] == row["gap"] == row["steps_done"] == row["parameters"] == ""
    assert Path("runs/mine/results.json").read_bytes() == before


def test_slurm_files_train_each_run_once_in_arrays_of_one_shape(capsys):
    wide = TINY.replace("data.heldout_share", "mesh.fsdp").replace("0.1, 0.2", "1, 16").replace("0.1", "1")
    Path("mine.py").write_text(
        wide.replace("base = ", "base = override(")
        .replace("layers=2)", 'layers=2), {"train.batch_size": 16, "train.eval_sequences": 16})')
        .replace("from fake_run", "from mhc_jax.config import override\nfrom fake_run")
    )
    assert main(["sweep", "mine.py", "--launch", "slurm", "--out", "a b/mine"]) == 0
    jobs = Path("a b/mine/jobs").resolve()
    assert shlex.split(capsys.readouterr().out.splitlines()[1]) == ["bash", str(jobs / "submit.sh")]
    small, large = (jobs / f"runs-{devices}.sbatch" for devices in (1, 16))
    assert "--array=1,3,5,7\n" in small.read_text() and "--nodes=1\n#SBATCH --ntasks-per-node=1\n" in small.read_text()
    assert "--array=2,4,6,8\n" in large.read_text() and "--nodes=2\n#SBATCH --ntasks-per-node=8\n" in large.read_text()
    assert f"mhc-jax sweep '{jobs.parent}' --only" in small.read_text()
    submit = (jobs / "submit.sh").read_text()
    assert submit.count("--dependency=afterok") == 2 and "data.sbatch" in submit


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Commands of a cluster that note how they were called; `srun` does what it is given, and mhc-jax ends with the status in STATUS."""
    commands = {
        "sbatch": 'echo sbatch "$@" >> "$LOG"; echo 77',
        "scontrol": 'echo scontrol "$@" >> "$LOG"',
        "srun": 'while [[ "$1" == --* ]]; do shift; done; exec "$@"',
        "mhc-jax": 'echo mhc-jax "$@" cache="${MHC_JAX_CACHE:-}" >> "$LOG"; exit "${STATUS:-0}"',
        "xpk": 'printf "%s|" xpk "$@" >> "$LOG"; echo >> "$LOG"',
    }
    for name, text in commands.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    monkeypatch.delenv("MHC_JAX_CACHE", raising=False)
    log = tmp_path / "log"

    def call(script, **variables):
        log.write_text("")
        environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "LOG": str(log), **variables}
        done = subprocess.run(["bash", str(script)], env=environment, cwd="/", capture_output=True, text=True, check=False)
        return done.returncode, log.read_text().splitlines()

    return call


def test_the_jobs_of_slurm_do_what_they_should(tmp_path, cluster):
    assert main(["sweep", "mine.py", "--launch", "slurm"]) == 0
    folder = tmp_path / "runs/mine"
    jobs = folder / "jobs"
    assert cluster(jobs / "submit.sh") == (
        0,
        [f"sbatch --parsable {jobs}/data.sbatch", f"sbatch --dependency=afterok:77 {jobs}/runs-1.sbatch"],
    )
    assert cluster(jobs / "data.sbatch") == (0, [f"mhc-jax data {folder} cache={tmp_path}/cache"])
    task = {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_JOB_ID": "78"}
    called = f"mhc-jax sweep {folder} --only 5 cache=/elsewhere"
    assert cluster(jobs / "runs-1.sbatch", MHC_JAX_CACHE="/elsewhere", **task) == (0, [called])
    assert cluster(jobs / "runs-1.sbatch", MHC_JAX_CACHE="/elsewhere", STATUS="2", **task) == (2, [called])
    assert cluster(jobs / "runs-1.sbatch", MHC_JAX_CACHE="/elsewhere", STATUS="143", **task) == (143, [called, "scontrol requeue 78_5"])


def test_the_jobs_of_xpk_do_what_they_should(tmp_path, cluster):
    assert main(["sweep", "mine.py", "--launch", "xpk", "--out", str(tmp_path / "x y"), "--only", "1", "2"]) == 0
    submit = tmp_path / "x y/jobs/submit.sh"
    status, called = cluster(submit, CLUSTER="c", IMAGE="i", TPU_TYPE="v5e-8")
    assert status == 0 and len(called) == 2
    words = called[1].split("|")
    assert words[words.index("--tpu-type") + 1] == "v5e-8"
    command = shlex.split(words[words.index("--command") + 1])
    assert command == ["mhc-jax", "sweep", str(tmp_path / "x y"), "--only", "residual_heldout_share=0.2-seed0"]
    assert cluster(submit, CLUSTER="c") == (1, [])  # without an image nothing is submitted


def test_xpk_files_are_one_a_run_and_need_a_folder_that_hosts_see(tmp_path, capsys):
    assert main(["sweep", "mine.py", "--launch", "xpk"]) == 2
    assert "give --out gs://BUCKET/FOLDER" in capsys.readouterr().err and not Path("runs").exists()
    assert main(["sweep", "mine.py", "--launch", "xpk", "--out", str(tmp_path / "here"), "--only", "2", "5"]) == 0
    jobs = sorted((tmp_path / "here/jobs").iterdir())
    assert [path.name for path in jobs] == ["residual_heldout_share=0.1-seed1.sh", "residual_heldout_share=0.2-seed0.sh", "submit.sh"]
    assert "--workload sweep-mine-5 " in jobs[0].read_text()
    assert f"--command 'mhc-jax sweep {tmp_path}/here --only residual_heldout_share=0.1-seed1'" in jobs[0].read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no file bad.py"),
        ("x = 1\n", "bad.py has no function sweep() of its own"),
        ("from mhc_jax.experiments.sweeps import sweep\n", "bad.py has no function sweep() of its own"),
        ("def sweep():\n    return 3\n", "sweep() of bad.py returns 3, not a RunList"),
        ("def sweep():\n    return None\n", "bad.py has no function sweep() of its own that returns a RunList"),
        ("def sweep(:\n", "bad.py, line 1: SyntaxError"),
        ("import nothing_of_that_name\n", "bad.py, line 1: ModuleNotFoundError"),
        ("def sweep():\n\n    return 1 / 0\n", "bad.py, line 3: ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)\n", "bad.py, line 1: SystemExit: 3"),
        ("\0", "bad.py"),
        (TINY.replace('"train.seed", 0, 1', '"train.seed", 0, 0'), "bad.py, line 10: mine: points 1 and 5 are the same run"),
        (TINY.replace('"residual", "mhc"', '"residual", "mch"'), "bad.py, line 10: point 3 of the sweep"),
    ],
)
def test_a_bad_file_gets_one_message(content, message, capsys):
    if content is not None:
        Path("bad.py").write_text(content)
    assert main(["sweep", "bad.py"]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and not Path("runs").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere"], "there is no sweep 'nowhere': it is neither a file that ends in .py, nor one of depth30_search"),
        (["mine.py", "--only"], "--only names no run of mine; give numbers from 1 to 8"),
        (["mine.py", "--only", "0"], "there is no run '0' in mine; give 1 to 8, or a name: residual_heldout_share=0.1-seed0"),
        (["mine.py", "--only", "9", "--launch", "slurm"], "there is no run '9'"),
        (["mine.py", "--out", "ftp://x"], "there is no store ftp://"),
    ],
)
def test_bad_arguments_get_one_message(args, message, capsys):
    assert main(["sweep", *args]) == 2
    assert message in capsys.readouterr().err and not Path("runs").exists()


def test_the_folder_of_a_list_takes_no_other(capsys):
    assert main(["sweep", "mine.py", "--launch", "slurm"]) == 0
    assert main(["sweep", "runs/mine", "--out", "elsewhere"]) == 2
    assert "--out would be another one" in capsys.readouterr().err


SMALL = """
from fake_run import tiny_config
from mhc_jax.config import override
from mhc_jax.experiments import sweeps

def sweep():
    changes = {"model.residual": "residual", "data.source": ("*.txt",), "data.seq_len": 16, "model.vocab_size": 280}
    return sweeps.sweep("small", "?", override(tiny_config(steps=4, eval_every=2, layers=2), changes), sweeps.field("train.seed", 0, 1))
"""


@pytest.mark.slow
def test_tasks_that_train_at_once_leave_what_one_after_the_other_does(tmp_path):
    """Two processes of one sweep, begun together without prepared text, and the same sweep in one process: the same curves."""
    (tmp_path / "text.txt").write_text("".join(f"{i} streams and rows that sum to one. " for i in range(300)))
    (tmp_path / "other.txt").write_text("".join(f"{i} columns nearly do. " for i in range(300)))
    Path("small.py").write_text(SMALL)
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths, "MHC_JAX_CACHE": str(tmp_path / "cache")}

    def start(*words):
        return subprocess.Popen([sys.executable, "-m", "mhc_jax.cli", "sweep", "small.py", *words], env=environment, cwd=tmp_path)

    together = [start("--out", "many", "--only", number) for number in ("1", "2")]
    assert [process.wait() for process in together] == [0, 0]
    assert [path.name for path in (tmp_path / "many").iterdir()] == ["runs"]
    assert start("--out", "one").wait() == 0
    for run in load_runs(tmp_path / "one").runs:
        metrics = [tmp_path / folder / "runs" / run.name / "metrics.jsonl" for folder in ("many", "one")]
        together_losses, alone = [[json.loads(line)["loss"] for line in path.read_text().splitlines()] for path in metrics]
        assert len(alone) == 7 and together_losses == alone


def test_data_tokenises_every_text_of_a_list_once(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(
        "mhc_jax.data.prepare.prepare", lambda data, vocab_size, progress: asked.append(data) or type("P", (), {"sources": ()})
    )
    assert main(["data", "mine.py"]) == 0
    assert [data.heldout_share for data in asked] == [0.1, 0.2]


def test_the_example_of_the_documentation_runs(capsys):
    text = DOCUMENT.read_text()
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    small = '{"train.steps": 4, "train.eval_every": 2, "model.num_layers": 2, "optimizer.warmup_steps": 2, "train.checkpoint_every": 2}'
    program, replaced = re.subn(r'\{"train.steps".*?\}', small, program)
    assert replaced == 1
    Path("rates.py").write_text(program)
    commands = [line.split("#")[0] for line in re.findall(r"^ {4}mhc-jax (.*)$", text, re.MULTILINE)]
    assert {line.split()[0] for line in commands} == {"sweep", "report"}
    for command in commands:
        if "gs://" not in command and "laptop_learning_rates" not in command:
            assert main(shlex.split(command)) == 0, command
    rows = list(csv.DictReader(Path("rates.csv").read_text().splitlines()))
    assert all(row["state"] == "finished" for row in rows)
    assert set(rows[0]) >= {"model.residual", "optimizer.learning_rate", "train.seed", "loss"}
