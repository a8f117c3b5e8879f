"""Kills training runs at random moments, lets each go on, and compares it bit for bit with a run that nobody disturbed.

    python -m tests.soak.kill_soak --kills 100 --seed 0

Every trial is a fresh run folder. The command is started, its process group is killed at a moment drawn uniformly from the seconds that a
run takes (start-up, compilation, checkpoint writing and the summary included), and the same command is given again until it finishes. A run
that was faster than its moment is tried again with another. Compared are metrics.jsonl and summary.json without wall-clock times, the
bytes of the stability arrays, and what the last checkpoint holds. Prints a line a trial and a table; the exit status is 1 if anything
differs.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 200, 20
FIELDS = {
    "--model.num-layers": 2,
    "--model.dim": 32,
    "--model.dense-dim": 32,
    "--model.vocab-size": 280,
    "--model.attention.num-heads": 2,
    "--model.moe.num-experts": 4,
    "--model.moe.expert-dim": 16,
    "--data.seq-len": 32,
    "--data.heldout-share": 0.2,
    "--train.batch-size": 4,
    "--train.eval-sequences": 8,
    "--train.steps": STEPS,
    "--train.eval-every": EVERY,
    "--train.checkpoint-every": EVERY,
}
TIMES = {"seconds", "tokens_per_second", "step_seconds", "first_step_seconds", "compile_seconds"}
SECONDS = 300.0  # after which a start counts as hanging


@dataclass(frozen=True)
class Trial:
    """What became of one run that was killed."""

    number: int
    after: float  # seconds from its start to the signal
    phase: str  # in which the signal struck
    resumed: str  # step that the second start went on from
    differences: tuple[str, ...]


@dataclass(frozen=True)
class Bench:
    """Where runs live and how they are started."""

    folder: Path

    def command(self, run: Path) -> list[str]:
        fields = [word for flag, value in FIELDS.items() for word in (flag, str(value))]
        source = f"{self.folder}/corpus/*.txt"
        return [sys.executable, "-u", "-m", "mhc_jax.cli", "train", "laptop", "--out", str(run), "--data.source", source, *fields]

    def start(self, run: Path, output: Path) -> subprocess.Popen[bytes]:
        environment = os.environ | {"MHC_JAX_CACHE": str(self.folder / "cache"), "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        with output.open("ab") as file:
            return subprocess.Popen(
                self.command(run), stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=self.folder, start_new_session=True
            )

    def finish(self, run: Path, output: Path) -> float:
        """Starts the command and returns the seconds that it took to end well."""
        begun = time.monotonic()
        process = self.start(run, output)
        try:
            status = process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        if status:
            raise RuntimeError(f"the command ended with status {status}; it printed:\n{output.read_text()[-3000:]}")
        return time.monotonic() - begun


def prepare_corpus(folder: Path) -> None:
    """Forty text files of a few words in random order."""
    folder.mkdir(parents=True)
    rng = random.Random(0)
    words = ["stream", "residual", "mixes", "four", "rows", "sum", "to", "one"]
    for i in range(40):
        (folder / f"{i:02}.txt").write_text(" ".join(rng.choice(words) for _ in range(200)))


def prepare(folder: Path) -> tuple[Bench, Path, float]:
    """A corpus, a warm cache, a run that nobody disturbed, and the seconds that such a run takes."""
    prepare_corpus(folder / "corpus")
    bench = Bench(folder)
    bench.finish(folder / "cold", folder / "cold.log")  # fills the cache
    whole = folder / "whole"
    return bench, whole, bench.finish(whole, folder / "whole.log")


def trial(bench: Bench, whole: Path, number: int, seed: int, seconds: float, with_signal: signal.Signals) -> Trial:
    """One run that gets a signal within so many seconds of its start, and goes on."""
    run, output, rng = bench.folder / f"run-{number}", bench.folder / f"run-{number}.log", random.Random(f"{seed} {number}")
    while True:
        after = rng.uniform(0, seconds)
        process = bench.start(run, output)
        try:
            process.wait(after)
        except subprocess.TimeoutExpired:
            phase = strike(process, run, with_signal)
            return Trial(number, after, phase, *go_on(bench, run, whole))
        shutil.rmtree(run)


def strike(process: subprocess.Popen[bytes], run: Path, with_signal: signal.Signals = signal.SIGKILL) -> str:
    """Sends the signal, waits for the end, and returns what the run was doing."""
    phase = phase_of(run)
    os.killpg(process.pid, with_signal)
    process.wait(SECONDS)
    return phase


def go_on(bench: Bench, run: Path, whole: Path) -> tuple[str, tuple[str, ...]]:
    """Gives the command of a cut run again; returns the step that it resumed from, and in what it differs from the whole run."""
    output = bench.folder / f"{run.name}-again.log"
    try:
        bench.finish(run, output)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        return "?", (str(error),)
    resumed = re.search(r"resuming after step (\d+)", output.read_text())
    return resumed[1] if resumed else "-", tuple(differences(run, whole))


def phase_of(run: Path) -> str:
    """What the run is doing, as far as its folder shows."""
    if not (run / "metrics.jsonl").exists():
        return "before the first step"
    if (run / "summary.json").exists():
        return "after the summary"
    if any((run / "checkpoints").glob("unfinished-*")):
        return "saving"
    steps = [line["step"] for line in lines(run)]
    if not steps or steps[-1] == 0:
        return "before the first step"
    return "finishing" if steps[-1] == STEPS else "training"


def lines(run: Path) -> list[dict[str, Any]]:
    """The complete lines of metrics.jsonl."""
    text = (run / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def differences(run: Path, whole: Path) -> list[str]:
    """What differs between two finished runs, wall-clock times aside; bit for bit."""
    found = []
    if [without_times(line) for line in lines(run)] != [without_times(line) for line in lines(whole)]:
        found.append("metrics.jsonl")
    a, b = ({path.name: path.read_bytes() for path in (folder / "stability").glob("*")} for folder in (run, whole))
    found += [f"stability/{name}" for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]
    a, b = (json.loads((folder / "checkpoints" / str(STEPS) / "about.json").read_text())["content"] for folder in (run, whole))
    found += [f"{key} of the last checkpoint" for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
    a, b = (without_times(json.loads((folder / "summary.json").read_text())) for folder in (run, whole))
    found += [f"{key} in summary.json" for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
    return found


def without_times(values: dict[str, Any]) -> dict[str, Any]:
    """The entries that do not depend on how fast the machine was."""
    return {key: value for key, value in values.items() if key not in TIMES}


def table(trials: Sequence[Trial]) -> str:
    """How many runs were struck in which phase, where they went on from, and how many differ."""
    rows = ["| phase | kills | resumed from step | runs that differ |", "|---|---:|---|---:|"]
    for phase, count in Counter(trial.phase for trial in trials).most_common():
        members = [trial for trial in trials if trial.phase == phase]
        resumed = sorted({trial.resumed for trial in members}, key=lambda step: (not step.isdigit(), int(step) if step.isdigit() else 0))
        rows.append(f"| {phase} | {count} | {', '.join(resumed)} | {sum(bool(trial.differences) for trial in members)} |")
    return "\n".join([*rows, f"| all | {len(trials)} | | {sum(bool(trial.differences) for trial in trials)} |"])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the soak; 0 when every run equals the undisturbed one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="trials; each is killed once")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--jobs", type=int, default=1, help="trials at a time")
    parser.add_argument("--signal", choices=("KILL", "TERM"), default="KILL")
    parser.add_argument("--folder", type=Path, help="a new folder, which is kept; default: a temporary one")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        bench, whole, seconds = prepare(options.folder.resolve() if options.folder else Path(temporary) / "soak")
        print(f"an undisturbed run takes {seconds:.1f} s", flush=True)
        trials, with_signal = [], signal.Signals[f"SIG{options.signal}"]
        with ThreadPoolExecutor(options.jobs) as pool:
            jobs = [pool.submit(trial, bench, whole, i, options.seed, seconds, with_signal) for i in range(options.kills)]
            for job in jobs:
                trials.append(done := job.result())
                verdict = "equal" if not done.differences else f"DIFFERS: {'; '.join(done.differences)}"
                print(f"{done.number}: struck after {done.after:.2f} s, {done.phase}; went on from {done.resumed}; {verdict}", flush=True)
    print(table(trials))
    return int(any(trial.differences for trial in trials))


if __name__ == "__main__":
    sys.exit(main())
