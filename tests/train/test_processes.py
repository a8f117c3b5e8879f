"""Two real processes that train one run together: stopped by SIGTERM after the same step, resumed, and the same as an undisturbed run."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mhc_jax.train.metrics import read_lines

PROGRAM = """
import sys
import jax

address, index, source, folder = sys.argv[1:]
jax.config.update("jax_disable_most_optimizations", True)  # compiling would be most of the time
jax.distributed.initialize(address, num_processes=2, process_id=int(index), heartbeat_timeout_seconds=30)
from pathlib import Path
from mhc_jax.config import override
from mhc_jax.errors import Preempted
from mhc_jax.train.loop import train
from small import BASE

config = override(BASE, {
    "model.residual": "residual", "model.num_layers": 1, "model.vocab_size": 280, "mesh.fsdp": 2,
    "optimizer.learning_rate": 1e-2, "optimizer.warmup_steps": 2,
    "data.seq_len": 32, "data.source": (source,), "data.heldout_share": 0.2,
    "train.steps": 60, "train.eval_every": 20, "train.eval_sequences": 8, "train.checkpoint_every": 20,
})
try:
    print("loss", train(config, Path(folder))["loss"], flush=True)
except Preempted as stop:
    print(stop, flush=True)
    jax.distributed.shutdown()
    sys.exit(143)
"""


def start(source: str, folder: Path) -> list[subprocess.Popen[str]]:
    """Both processes, with one CPU device each."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        address = f"localhost:{found.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{Path(__file__).parents[1]}:{Path(__file__).parents[2]}"}
    commands = [[sys.executable, "-u", "-c", PROGRAM, address, str(index), source, str(folder)] for index in range(2)]
    return [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for command in commands]


def end(running: list[subprocess.Popen[str]], status: int) -> list[str]:
    """What both printed, once both have ended with this status."""
    try:
        printed = [process.communicate(timeout=480)[0] for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert [process.returncode for process in running] == [status, status], printed
    return printed


def curve(folder: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_lines(folder / "metrics.jsonl")]


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_stops_both_after_the_same_step(corpus, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    losses = [text.splitlines()[-1] for text in end(start(corpus, whole), 0)]
    assert losses[0] == losses[1]

    running = start(corpus, stopped)
    deadline = time.monotonic() + 480
    while not (stopped / "metrics.jsonl").exists() or len((stopped / "metrics.jsonl").read_text().splitlines()) < 5:
        assert time.monotonic() < deadline and all(process.poll() is None for process in running)
        time.sleep(0.02)
    running[1].send_signal(signal.SIGTERM)  # not the one that writes
    said = [text.splitlines()[-1] for text in end(running, 143)]
    assert said[0] == said[1]
    step = int(said[0].split("after step ")[1].split(",")[0])
    assert step < 60 and (stopped / "checkpoints" / str(step)).is_dir()
    assert curve(stopped)[-1]["step"] == step

    assert [text.splitlines()[-1] for text in end(start(corpus, stopped), 0)] == losses
    assert curve(stopped) == curve(whole)
    assert len(list((stopped / "tensorboard").iterdir())) == 2  # one file a start: the other process wrote none
