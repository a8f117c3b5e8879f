"""Compiles a config's training step for a machine that is not here, in a process of its own, and reads off what the compiler tells.

libtpu reads where to dump when it loads, so every compilation gets a new process. The step is `train.step.compile_train_step`'s, with the
shardings that training gives its state and batch; arrays are shapes alone. What the step costs is for `plan.model` to say.
"""

import importlib
import os
import pickle
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from mhc_jax.config import Config
from mhc_jax.errors import UserError
from mhc_jax.nn.residual.kinds import CONNECTIONS
from mhc_jax.parallel.mesh import make_mesh
from mhc_jax.parallel.rules import Rules
from mhc_jax.plan.topologies import parse
from mhc_jax.train.step import TrainState, compile_train_step, initial_state, state_shardings
from pallas_kernels.static_cost import last_words, listings, target_devices
from pallas_kernels.static_cost.compile import TPU_ENVIRONMENT

DUMP = "--xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=packed-bundles-post-ra|deduplication-map"
START = "from mhc_jax.plan.compile import main; main()"
TOLD_EVERY = 30.0  # seconds
# What it says depends on how early it sees that there is no room: of all that it laid out, or of temporaries before they are laid out.
REFUSED = re.compile(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm")
REFUSED_EARLY = re.compile(r"required for HLO temporaries \(([\d.]+)([KMGT])\) exceeds available HBM")
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

Say = Callable[[str], None]


@dataclass(frozen=True)
class Memory:
    """Bytes of one device. The first three are its share of the arrays, without what their layout pads."""

    parameters: int
    optimizer: int
    tables: int  # Engram's, with their optimizer
    arguments: int  # as the compiler lays them out: all of the above and the batch
    temporaries: int  # activations, gradients and workspace, beyond arguments and results
    peak: int  # arguments, results and temporaries, shared memory counted once


@dataclass(frozen=True)
class Program:
    """What the compiler made of a step. Where it refused for want of memory, `text` is empty and the peak is what it said it needs."""

    memory: Memory
    seconds: float  # tracing, lowering and compiling
    text: str = ""  # the module
    listings: dict[str, str] | None = None  # the bundle listings of its instructions, on a TPU
    coordinates: tuple[tuple[int, ...], ...] = ()  # of the chip of each partition, in the order of the mesh
    flops: float | None = None  # of one device by XLA's count, which takes the body of a loop once
    bytes_accessed: float | None = None  # likewise


def compile_step(config: Config, target: str, say: Say, keep: Path | None = None) -> Program:
    """Compiles the training step of a config on the mesh that it asks for.

    Args:
      config: the run; its mesh may have at most as many devices as the target.
      target: "v5p:4x4x8" or "H200", as `static_cost.compile_for` has it.
      say: is told every half minute how long it takes.
      keep: an empty folder for the compiler's dump, to read it; by default it is removed.

    Raises:
      UserError: the process was killed, as for want of this machine's memory; or it could not know the residual part.
      RuntimeError: the compiler failed, but for want of the device's memory; with its last words.
    """
    with TemporaryDirectory(prefix="plan_") as scratch:
        dump, result, errors = keep or Path(scratch) / "dump", Path(scratch) / "program", Path(scratch) / "errors"
        dump.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        if ":" in target:
            environment |= TPU_ENVIRONMENT | {"JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={dump} {DUMP}"}
        else:
            environment |= {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
        request = Path(scratch) / "request"
        request.write_bytes(pickle.dumps((_origin(config.model.residual), config, target, dump, result)))
        with errors.open("wb") as written, request.open("rb") as given:
            child = subprocess.Popen([sys.executable, "-c", START], stdin=given, stdout=written, stderr=written, env=environment)
            try:
                _wait(child, f"{config.name}, {config.model.residual}, for {target}", say)
            finally:
                child.kill()
                child.wait()
        if child.returncode == -signal.SIGKILL:
            raise UserError(
                f"the compiler was killed while it compiled {config.name} for {target}, likely because this machine ran out of memory: "
                "large slices take more than 10 GB; free some, or plan a smaller slice"
            )
        if child.returncode:
            said = last_words(errors.read_text(errors="replace"))
            raise RuntimeError(f"compiling {config.name} for {target} failed: {said}")
        return pickle.loads(result.read_bytes())


def main() -> None:
    """What the new process runs."""
    (module, script), config, target, dump, result = pickle.loads(sys.stdin.buffer.read())
    if script is None:
        importlib.import_module(module)
    else:
        runpy.run_path(script, run_name="__mp_main__")  # the name that processes of Python's multiprocessing give it
    jax.config.update("jax_enable_compilation_cache", False)  # what comes out of a cache dumps nothing
    result.write_bytes(pickle.dumps(_compile(config, target, dump)))


def _origin(residual: str) -> tuple[str, str | None]:
    """What the new process has to read to know a residual part: its module, or the file where that is the one that was started."""
    module = CONNECTIONS[residual].__module__
    script = getattr(sys.modules["__main__"], "__file__", None) if module == "__main__" else None
    if module == "__main__" and script is None:
        raise UserError(f'the part "{residual}" was made in no file, and a plan is made in a process of its own; put it into a file')
    return module, script


def _compile(config: Config, target: str, dump: Path) -> Program:
    start = time.perf_counter()
    memory_bytes = parse(target).hbm_bytes_per_device if ":" in target else None
    mesh = make_mesh(config.mesh, target_devices(target))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        state, batch = arguments(config, mesh, Rules())
        try:
            step, peak = compile_train_step(config, Rules(), state, batch, memory_bytes=memory_bytes, again=partial(_clear, dump))
        except jax.errors.JaxRuntimeError as error:
            held = _local_bytes((state, batch))
            peak = needed_bytes(str(error), held)
            if peak is None:
                raise
            return Program(_memory(state, peak, held), time.perf_counter() - start)
    seconds = time.perf_counter() - start
    told: Any = step.memory_analysis()  # type: ignore[attr-defined]
    count = step.cost_analysis() or {}  # type: ignore[attr-defined]
    return Program(
        _memory(state, peak or 0, told.argument_size_in_bytes),
        seconds,
        step.as_text(),  # type: ignore[attr-defined]
        listings(dump),
        tuple(tuple(getattr(device, "coords", ())) for device in mesh.devices.flat),
        count.get("flops"),
        count.get("bytes accessed"),
    )


def _clear(dump: Path) -> None:
    """Takes away what an earlier compilation left: names of instructions come again."""
    for path in dump.iterdir():
        path.unlink()


def needed_bytes(refusal: str, arguments: int) -> int | None:
    """Bytes of a device that the compiler's refusal names, with a step's arguments; None where it is about something else."""
    if found := REFUSED.search(refusal):
        return round(float(found[1]) * UNITS[found[2]])
    if found := REFUSED_EARLY.search(refusal):
        return arguments + round(float(found[1]) * UNITS[found[2]])
    return None


def arguments(config: Config, mesh: Mesh, rules: Rules) -> tuple[TrainState, dict[str, jax.ShapeDtypeStruct]]:
    """The shapes of state and batch, laid out as training does it."""
    shapes = jax.eval_shape(lambda: initial_state(config))
    state = jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes,
        state_shardings(config, mesh, rules),
    )
    of_batch = NamedSharding(mesh, rules.spec("batch", "sequence"))
    size = (config.train.batch_size, config.data.seq_len)
    batch = {name: jax.ShapeDtypeStruct(size, np.int32, sharding=of_batch) for name in ("tokens", "targets", "segment_ids", "positions")}
    if (engram := config.model.engram) is not None:
        batch["engram_rows"] = jax.ShapeDtypeStruct((*size, len(engram.layers), engram.all_heads), np.int32, sharding=of_batch)
    return state, batch


def _memory(state: TrainState, peak: int, arguments: int) -> Memory:
    return Memory(
        _local_bytes(state.model), _local_bytes(state.optimizer), _local_bytes(state.memory), arguments, max(0, peak - arguments), peak
    )


def _local_bytes(arrays: Any) -> int:
    """What one device holds of arrays."""
    return sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(arrays))


def _wait(child: subprocess.Popen[bytes], what: str, say: Say) -> None:
    start = time.perf_counter()
    say(f"compiling {what}")
    while True:
        try:
            child.wait(TOLD_EVERY)
            return
        except subprocess.TimeoutExpired:
            say(f"  still compiling {what}: {time.perf_counter() - start:.0f} s")
