"""Compiles a program for a TPU in a process of its own and models its cost there.

libtpu reads where to dump when it loads, and a process loads it once, so every compilation that is to be costed gets a new process. Several
may run at once. The program travels as a pickled function that builds it, so that function must be importable.
"""

import os
import pickle
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax

from pallas_kernels.static_cost.chips import chip_of
from pallas_kernels.static_cost.compile import TPU_ENVIRONMENT, check_libtpu, compile_for
from pallas_kernels.static_cost.hlo import parse_module
from pallas_kernels.static_cost.model import Cost, model_cost

Build = Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]

LISTING = re.compile(r"\d+-(.+?)-\d+-packed-bundles-post-ra\.txt")
DUMP = "--xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=packed-bundles-post-ra|deduplication-map"
START = "from pallas_kernels.static_cost.child import main; main()"


def cost(build: Build, floor_bytes: int, topology: str, *, floor_flops: int = 0, rare: bool = False, keep: Path | None = None) -> Cost:
    """The modelled cost of one call of a program on one device of a TPU that is not there.

    Args:
      build: returns `(fn, args)` as `Case.build` does, `args` being pytrees of `jax.ShapeDtypeStruct`; shardings over an `AbstractMesh` lay
        them out over several devices of the topology. A function of a module, or `functools.partial` of one: it is called in a new process.
      floor_bytes: the fewest bytes that HBM has to move on one device.
      topology: "v6e:2x2" or another TPU topology.
      floor_flops: the fewest FLOPs that the matrix units have to do on one device.
      rare: whether code of kernels under conditions on data is left out; see `Case.rare`.
      keep: a folder for the compiler's dump, to read it; by default it is removed.

    Raises ValueError for a topology that is not known and where libtpu is missing, and RuntimeError with the
    compiler's last words where it fails.
    """
    chip_of(topology)
    check_libtpu()
    with TemporaryDirectory(prefix="static_cost_") as scratch:
        dump = keep or Path(scratch) / "dump"
        dump.mkdir(parents=True, exist_ok=True)
        if any(dump.iterdir()):
            raise ValueError(f"{dump} is not empty; the compiler's dump needs a folder of its own")
        result = Path(scratch) / "cost"
        environment = os.environ | TPU_ENVIRONMENT
        environment |= {
            "JAX_PLATFORMS": "cpu",
            "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={dump} {DUMP}",
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        }
        request = pickle.dumps((build, floor_bytes, topology, floor_flops, rare, dump, result))
        done = subprocess.run([sys.executable, "-c", START], input=request, env=environment, capture_output=True, check=False)
        if done.returncode:
            raise RuntimeError(f"compiling for {topology} failed: {last_words(done.stderr.decode(errors='replace'))}")
        return pickle.loads(result.read_bytes())


def main() -> None:
    """What the new process runs."""
    build, floor_bytes, topology, floor_flops, rare, dump, result = pickle.loads(sys.stdin.buffer.read())
    jax.config.update("jax_enable_compilation_cache", False)  # what comes out of a cache dumps nothing
    start = time.perf_counter()
    fn, args = build()
    compiled = compile_for(topology, fn, args)
    seconds = time.perf_counter() - start
    module = parse_module(compiled.as_text() or "")
    modelled = model_cost(module, listings(dump), chip_of(topology), topology, floor_bytes, rare, floor_flops)
    memory = compiled.memory_analysis()
    temporaries = memory.temp_size_in_bytes if memory else 0
    result.write_bytes(pickle.dumps(replace(modelled, compile_seconds=seconds, hbm_temp_bytes=temporaries)))


def last_words(errors: str) -> str:
    """The exception at the end of a traceback, without the traceback and without what JAX says of its own frames."""
    lines = [line for line in errors.splitlines() if line.strip()]
    starts = [place for place, line in enumerate(lines) if re.match(r"[A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt)\b", line)]
    said = lines[starts[-1] :] if starts else lines[-5:]
    return "\n".join(line for line in said if not line.startswith(("-----", "For simplicity, JAX")))


def listings(dump: Path) -> dict[str, str]:
    """The listing of each instruction in a dump. Instructions that the compiler found equal share one."""
    found: dict[str, str] = {}
    for path in sorted(dump.iterdir()):
        match = LISTING.fullmatch(path.name)
        if match and not match[1].startswith(("<", "TLP")) and "schedule-analysis" not in path.name:
            found[match[1]] = path.read_text()
    for path in dump.glob("*deduplication-map.txt"):
        key = ""
        for line in path.read_text().splitlines():
            if line.startswith("key:"):
                key = line.removeprefix("key:").strip()
            elif line.startswith("  ") and key in found:
                found.setdefault(line.strip(), found[key])
    return found
