"""Real processes that train one run together: the same curve as one process, stopped and killed, and gone on from in another shape."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from small import BASE

from mhc_jax.config import Config, override
from mhc_jax.errors import UserError
from mhc_jax.train.folder import check_same_config
from mhc_jax.train.loop import train
from mhc_jax.train.metrics import read_lines

HEARTBEAT = 10  # seconds; the bound under test, shorter than a user's
STEPS = 40

PROGRAM = """
import sys
from mhc_jax import cli, configs
from test_processes import config_of

configs.CONFIGS["tiny"] = lambda: config_of(sys.argv[1])
sys.exit(cli.main(["train", "tiny", *sys.argv[2:]]))
"""


def config_of(source: str, **mesh: int) -> Config:
    changes = {
        "model.residual": "residual",
        "model.num_layers": 1,
        "model.vocab_size": 280,
        "optimizer.learning_rate": 1e-2,
        "optimizer.warmup_steps": 2,
        "data.seq_len": 32,
        "data.source": (source,),
        "data.heldout_share": 0.2,
        "train.steps": STEPS,
        "train.eval_every": 10,
        "train.eval_sequences": 8,
        "train.checkpoint_every": 10,
    }
    return override(BASE, changes | {f"mesh.{axis}": size for axis, size in mesh.items()})


def start(source: str, folder: Path, axis: str = "fsdp", of_second: Sequence[str] = ()) -> list[subprocess.Popen[str]]:
    """Both processes, with one CPU device each."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        address = f"localhost:{found.getsockname()[1]}"
    shared = {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiling would be most of the time
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
        "MHC_JAX_HEARTBEAT_SECONDS": str(HEARTBEAT),
        "PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parent, *Path(__file__).parents[1:3]))),
    }
    command = [sys.executable, "-u", "-c", PROGRAM, source, "--out", str(folder), f"--mesh.{axis}", "2"]
    return [
        subprocess.Popen(
            [*command, *more],
            env=os.environ | shared | {"JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, more in enumerate(((), of_second))
    ]


def end(running: list[subprocess.Popen[str]], status: int) -> list[tuple[str, str]]:
    """What both printed on standard output and error, once both have ended with this status."""
    try:
        printed = [process.communicate(timeout=240) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert [process.returncode for process in running] == [status, status], printed
    return printed


def wait_for(folder: Path, step: int, running: list[subprocess.Popen[str]]) -> None:
    """Until the run has written this step."""
    deadline, metrics = time.monotonic() + 240, folder / "metrics.jsonl"
    while not metrics.exists() or f'"step": {step},' not in metrics.read_text():
        assert time.monotonic() < deadline and all(process.poll() is None for process in running)
        time.sleep(0.02)


def curve(folder: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_lines(folder / "metrics.jsonl")]


def largest_difference(ours: Path, theirs: Path) -> float:
    """Of the losses of all steps and evaluations of two runs, in nats."""
    losses = [[(line["kind"], line["step"], line["loss"]) for line in curve(folder)] for folder in (ours, theirs)]
    assert [line[:2] for line in losses[0]] == [line[:2] for line in losses[1]]
    return float(np.abs(np.subtract(*([line[2] for line in of_run] for of_run in losses))).max())


def test_a_mesh_is_no_part_of_what_a_run_is():
    check_same_config(config_of("text"), config_of("text", data=2, fsdp=2), "the folder")
    with pytest.raises(UserError, match=r"train\.steps"):
        check_same_config(config_of("text"), override(config_of("text", fsdp=2), {"train.steps": 41}), "the folder")


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory) -> Path:
    """The run in one process with one device."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    train(config_of(corpus), folder, say=lambda line: None)
    return folder


@pytest.fixture(scope="module")
def together(corpus, tmp_path_factory) -> Path:
    """The run in two processes, undisturbed."""
    folder = tmp_path_factory.mktemp("together") / "run"
    (said, _), (of_other, error) = end(start(corpus, folder), 0)
    assert "held-out loss" in said.splitlines()[-1]
    assert all(line.startswith("[Gloo]") for line in of_other.splitlines())  # one speaks; that line is XLA's
    assert "joining as 1 of 2 processes at localhost:" in error
    return folder


@pytest.mark.slow
def test_two_processes_write_the_curve_of_one(alone, together):
    difference = largest_difference(together, alone)
    print(f"{STEPS} steps: losses of two processes differ by at most {difference:.1e} nats from those of one")
    assert difference < 1e-4


@pytest.mark.slow
def test_a_sequence_may_be_split_over_processes(corpus, alone, tmp_path):
    end(start(corpus, tmp_path / "run", axis="context"), 0)
    difference = largest_difference(tmp_path / "run", alone)
    print(f"sequences split over two processes: at most {difference:.1e} nats")
    assert difference < 1e-4


@pytest.mark.slow
def test_a_killed_process_ends_the_other_in_time_and_one_process_goes_on_on_another_mesh(corpus, alone, tmp_path):
    folder = tmp_path / "run"
    running = start(corpus, folder)
    wait_for(folder, 15, running)
    running[1].kill()
    killed = time.monotonic()
    running[1].communicate()
    try:
        _, error = running[0].communicate(timeout=3 * HEARTBEAT)
    finally:
        running[0].kill()
    seconds = time.monotonic() - killed
    print(f"the other ended {seconds:.1f} s after a kill -9, with status {running[0].returncode}")
    assert running[0].returncode not in (0, 2, 143)
    assert seconds < HEARTBEAT + 10  # noticing, and ending
    assert re.search("another task died|another process has ended", error)
    assert not (folder / "summary.json").exists()

    said: list[str] = []
    train(config_of(corpus, data=2), folder, say=said.append)
    assert any(re.fullmatch(r"resuming after step [123]0", line) for line in said)
    difference = largest_difference(folder, alone)
    print(f"gone on with data=2 in one process: at most {difference:.1e} nats")
    assert difference < 1e-4


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_stops_both_after_the_same_step(corpus, together, tmp_path):
    folder = tmp_path / "stopped"
    running = start(corpus, folder)
    wait_for(folder, 4, running)
    running[1].send_signal(signal.SIGTERM)  # not the one that writes
    said = [error.splitlines()[-1] for _, error in end(running, 143)]
    assert said[0] == said[1]
    step = int(said[0].split("after step ")[1].split(",")[0])
    assert step < STEPS and (folder / "checkpoints" / str(step)).is_dir()
    assert curve(folder)[-1]["step"] == step

    end(start(corpus, folder), 0)
    assert curve(folder) == curve(together)
    assert len(list((folder / "tensorboard").iterdir())) == 2  # one file a start: the other process wrote none


@pytest.mark.slow
def test_processes_that_were_given_different_things_all_say_so(corpus, tmp_path):
    for _, error in end(start(corpus, tmp_path / "run", of_second=("--seed", "1")), 2):
        assert "mhc-jax: the processes of the run differ in their config; start all with the same command" in error
