"""One run from start to finish: prepares data, compiles, trains, evaluates, saves, and resumes where it was cut."""

import math
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from mhc_jax import config as configs
from mhc_jax.config import Config
from mhc_jax.data.pipeline import heldout_batches, training_batches
from mhc_jax.data.prepare import Prepared, prepare
from mhc_jax.errors import UserError
from mhc_jax.files import write_atomically, write_json
from mhc_jax.nn.count import count_parameters
from mhc_jax.nn.decoder import learnable_mappings
from mhc_jax.parallel.mesh import make_mesh
from mhc_jax.parallel.rules import Rules
from mhc_jax.train.checkpoint import Checkpoints
from mhc_jax.train.folder import finished
from mhc_jax.train.metrics import MetricsWriter, finite, read_lines
from mhc_jax.train.progress import Progress
from mhc_jax.train.step import TrainState, compile_train_step, eval_step, placed_initial_state

PROFILED_STEPS = range(10, 15)  # after compilation and warm-up


@dataclass(frozen=True)
class Compiled:
    """The two programs of a run, and what the compiler says of the first."""

    train_step: Callable[..., Any]
    eval_step: Callable[..., Any]
    seconds: float  # spent compiling both
    memory_bytes: int | None  # peak of a training step: arguments, outputs and temporaries of one device


def train(config: Config, folder: Path, *, say: Callable[[str], None] = print, profile: bool = False) -> dict[str, Any]:
    """Trains a config in a run folder and returns its summary; a finished run returns at once, a cut one goes on.

    Raises:
      UserError: the folder belongs to another config, the data does not fit, the mesh asks for more devices than there are, or too few
        steps are left for a profile.
    """
    started = time.perf_counter()
    if (summary := finished(config, folder)) is not None:
        return summary
    mesh, rules = make_mesh(config.mesh), Rules()
    data = prepare(config.data, config.model.vocab_size, progress=say)
    place = partial(jax.make_array_from_process_local_data, NamedSharding(mesh, rules.spec("batch", None)))
    batches, heldout = _open_data(config, data, place)

    # Only now, so that a config refused above does not claim the folder.
    write_json(folder / "config.json", configs.to_json(config))
    write_atomically(folder / "config.txt", configs.to_text(config))
    with jax.set_mesh(mesh), Checkpoints(folder, config) as checkpoints:
        state = placed_initial_state(config, mesh, rules)
        if (restored := checkpoints.restore(state)) is not None:
            state, position = restored
            batches.set_state(position)
            say(f"resuming after step {int(state.step)}")
        first_step = int(state.step)
        if profile and (left := config.train.steps - first_step) < PROFILED_STEPS.stop:
            raise UserError(f"a profile needs {PROFILED_STEPS.stop} steps, but {left} are left to train; raise train.steps, or go without")
        say("compiling")
        programs = _compile(config, rules, state, heldout[0])
        clock = time.perf_counter()
        first_step_seconds: float | None = None  # stays so when a cut run had only its summary left to write

        # Without a checkpoint a cut run begins again, its step 0 included.
        with MetricsWriter(folder, -1 if restored is None else first_step) as writer, Progress(config, first_step) as progress:

            def evaluate() -> float:
                loss, scalars, arrays = _evaluate(programs, state, heldout)
                writer.write("eval", int(state.step), scalars)
                writer.write_stability(int(state.step), {**arrays, "learnable": learnable_mappings(config.model)})
                progress.evaluated(int(state.step), loss)
                return loss

            def finish(step: int, metrics: Any) -> None:
                nonlocal clock
                values = {name: float(value) for name, value in metrics._asdict().items()}  # waits for the device
                now = time.perf_counter()
                writer.write("train", step, {**values, "tokens": step * config.tokens_per_step, "seconds": now - clock})
                progress.stepped(step, values["loss"], now - clock)
                clock = now

            if first_step == 0:
                evaluate()
            pending: tuple[int, Any] | None = None  # the step that the device is still computing while the next batch is read
            clock = time.perf_counter()
            for step in range(first_step + 1, config.train.steps + 1):
                batch = {name: place(x) for name, x in next(batches).items()}
                if profile and step - first_step == PROFILED_STEPS.start:
                    jax.profiler.start_trace(folder / "profile")
                state, metrics = programs.train_step(state, batch)
                if pending is not None:
                    finish(*pending)
                pending = step, metrics
                if step == first_step + 1:
                    jax.block_until_ready(metrics)
                    first_step_seconds = time.perf_counter() - started
                    say(f"first step after {first_step_seconds:.1f} s, of which {programs.seconds:.1f} s compiling")
                if profile and step - first_step == PROFILED_STEPS.stop:
                    jax.block_until_ready(metrics)
                    jax.profiler.stop_trace()
                    say(f"profile written to {folder / 'profile'}")
                if step % config.train.eval_every == 0 or step == config.train.steps:
                    finish(*pending)
                    pending = None
                    loss = evaluate()
                    if step % config.train.checkpoint_every == 0 or step == config.train.steps:
                        checkpoints.save(state, batches.get_state(), loss)
                    clock = time.perf_counter()

    summary = _summary(config, folder, data, programs, first_step_seconds)
    write_json(folder / "summary.json", summary)
    return summary


def _open_data(config: Config, data: Prepared, place: Callable[[np.ndarray], jax.Array]) -> tuple[Any, list[dict[str, jax.Array]]]:
    """This process's share of the training batches, on the host; the held-out batches, on the devices."""
    index, processes = jax.process_index(), jax.process_count()
    batches = training_batches(
        data,
        seq_len=config.data.seq_len,
        batch_size=config.train.batch_size // processes,
        seed=config.train.seed,
        process_index=index,
        process_count=processes,
        read_threads=config.data.read_threads,
        workers=config.data.workers,
    )
    sequences = config.train.eval_sequences
    size = math.gcd(sequences, config.train.batch_size // config.train.microbatches)
    # The held-out rows are the same in every process, which places its share of them.
    heldout = [
        {name: place(np.split(x, processes)[index]) for name, x in batch.items()}
        for batch in heldout_batches(data, seq_len=config.data.seq_len, sequences=sequences, batch_size=size)
    ]
    return batches, heldout


def _compile(config: Config, rules: Rules, state: TrainState, heldout: dict[str, jax.Array]) -> Compiled:
    """Compiles both programs, for training batches that lie as the held-out ones do."""
    started = time.perf_counter()
    shape = (config.train.batch_size, config.data.seq_len)
    batch = {name: jax.ShapeDtypeStruct(shape, x.dtype, sharding=x.sharding) for name, x in heldout.items()}
    step, memory_bytes = compile_train_step(config, rules, state, batch)
    evaluation = jax.jit(partial(eval_step, rules=rules)).lower(state.model, state.router_bias, heldout).compile()
    return Compiled(step, evaluation, time.perf_counter() - started, memory_bytes)


def _evaluate(programs: Compiled, state: TrainState, heldout: list[Any]) -> tuple[float, dict[str, float], dict[str, np.ndarray]]:
    """Held-out loss, the scalars of metrics.jsonl and the stability arrays of the first held-out sequence."""
    results = [programs.eval_step(state.model, state.router_bias, batch) for batch in heldout]
    loss = sum(float(total) for total, _, _ in results) / sum(int(count) for _, count, _ in results)
    arrays = {name: np.asarray(value) for name, value in results[0][2]._asdict().items()}
    scalars = {
        "loss": loss,
        "max_attention_logit": max(float(s.max_attention_logit.max()) for _, _, s in results),
        "gain_forward": float(arrays["gain_forward_composite"].max()),
        "gain_backward": float(arrays["gain_backward_composite"].max()),
        "row_error": float(arrays["row_error"].max()),
        "column_error": float(arrays["column_error"].max()),
    }
    return loss, scalars, arrays


def _summary(config: Config, folder: Path, data: Prepared, programs: Compiled, first_step_seconds: float | None) -> dict[str, Any]:
    """summary.json, from what the run wrote; docs/results.md says what each entry is."""
    lines = read_lines(folder / "metrics.jsonl")
    steps = [line for line in lines if line["kind"] == "train"]
    evals = [line for line in lines if line["kind"] == "eval"]
    best = min(evals, key=lambda line: math.inf if line["loss"] is None else line["loss"])
    count = count_parameters(config.model)
    step_seconds = float(np.median([line["seconds"] for line in steps[1:] or steps]))
    losses = np.array([math.nan if line["loss"] is None else line["loss"] for line in steps])
    tail = steps[-max(len(steps) // 10, 1) :]
    tokens = config.train.steps * config.tokens_per_step

    def largest(key: str) -> float | None:
        values = [line[key] for line in evals]
        return None if None in values else max(values)

    return {
        "name": config.name,
        "residual": config.model.residual,
        "seed": config.train.seed,
        "steps": config.train.steps,
        "tokens": tokens,
        "loss": evals[-1]["loss"],
        "best_loss": best["loss"],
        "best_step": best["step"],
        "unigram_entropy": data.heldout_unigram_entropy,
        "parameters": count.total,
        "active_parameters": count.active,
        "connection_parameters": count.connection,
        "tokens_per_second": config.tokens_per_step / step_seconds,
        "step_seconds": step_seconds,
        "memory_bytes": programs.memory_bytes,
        "first_step_seconds": first_step_seconds,
        "compile_seconds": programs.seconds,
        "gain_forward": evals[-1]["gain_forward"],
        "gain_backward": evals[-1]["gain_backward"],
        "gain_forward_max": largest("gain_forward"),
        "gain_backward_max": largest("gain_backward"),
        "grad_norm": finite(float(np.mean([math.nan if line["grad_norm"] is None else line["grad_norm"] for line in tail]))),
        "clip_rate": float(np.mean([line["clipped"] for line in steps])),
        "loss_spikes": count_spikes(losses),
        "data": data.describe(tokens),
        "platform": {
            "device": jax.devices()[0].device_kind,
            "devices": config.mesh.data * config.mesh.fsdp,
            "jax": jax.__version__,
            "python": platform.python_version(),
            "system": sys.platform,
        },
    }


def count_spikes(losses: np.ndarray, window: int = 50, deviations: float = 6.0) -> int:
    """Steps whose loss is more than `deviations` standard deviations above the mean of the `window` steps before."""
    spikes = 0
    for step in range(window, len(losses)):
        before = losses[step - window : step]
        spikes += bool(losses[step] > before.mean() + deviations * before.std())
    return spikes
