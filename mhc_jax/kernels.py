"""The command `mhc-jax kernels`: what every kernel costs on every chip asked for, modelled, and measured where an accelerator is present.

The figures come from `pallas_kernels.static_cost` and `pallas_kernels.measure`; here are the choice of cases, the table and the JSON.
"""

import dataclasses
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax

from mhc_jax.errors import UserError
from mhc_jax.parallel.devices import has_accelerator
from pallas_kernels.case import Case, Implementation
from pallas_kernels.families import build_case, families
from pallas_kernels.measure import measure_copy_bandwidth, measure_pytorch_us, measure_us
from pallas_kernels.static_cost import Cost, check_libtpu, chip_of, cost

DEFAULT_TOPOLOGY = "v6e:2x2"
ACCELERATORS: dict[str, Implementation] = {"tpu": "tpu", "gpu": "gpu"}

COLUMNS = [
    "kernel",
    "case",
    "chip",
    "modelled_us",
    "floor_us",
    "floor_by",
    "over_floor",
    "vmem_mib",
    "compile_s",
    "xla_modelled_us",
    "xla_over_floor",
]
MEASURED_COLUMNS = [
    "kernel",
    "case",
    "device",
    "measured_us",
    "xla_measured_us",
    "pytorch_us",
    "floor_gb_per_s",
    "copy_gb_per_s",
    "floor_tflop_per_s",
]


@dataclass(frozen=True)
class Modelled:
    """One case on one topology: the cost of the kernel, of the XLA path and of the peers that are installed, or why there is none."""

    family: str
    case: Case
    topology: str
    kernel: Cost | str
    xla: Cost | str
    peers: dict[str, Cost | str]

    @property
    def valid(self) -> bool:
        """Whether both figures stand."""
        return all(isinstance(part, Cost) and part.valid for part in (self.kernel, self.xla))


def run_kernels(filters: Sequence[str], topologies: Sequence[str], json_file: Path | None, progress: Callable[[str], None]) -> int:
    """Models, and measures where it can; prints tables line by line through `progress`. Returns 1 if a figure is not valid, else 0.

    Args:
      filters: words that a case's FAMILY/KERNEL/DIRECTION/NAME must hold, all of them.
      topologies: TPU topologies to model; none asks for the accelerator here, or for DEFAULT_TOPOLOGY where there is none.
      json_file: where everything is written, the single operations included.
      progress: what is called with each line.
    """
    chosen = _choose(filters)
    here = _accelerator()
    record: dict[str, Any] = {"modelled": [], "measured": []}
    status = 0
    targets = list(topologies) or ([] if here else [DEFAULT_TOPOLOGY])
    if targets:
        _check(targets)
        progress(_line(COLUMNS))
        for reason in dict.fromkeys(case.unscheduled for _, case in chosen if case.unscheduled):
            names = ", ".join(dict.fromkeys(case.kernel for _, case in chosen if case.unscheduled == reason))
            progress(f"  {names}: measured on an accelerator only; {reason}")
    for row in _model(chosen, targets):
        progress(_line(_modelled_cells(row)))
        for name, part in (("kernel", row.kernel), ("XLA path", row.xla)):
            for problem in [part] if isinstance(part, str) else part.problems:
                progress(f"  not valid, {name}: {problem}")
        if isinstance(row.kernel, Cost) and row.kernel.conditional_us is not None:
            said = f"left out ({row.case.rare}); with it" if row.case.rare else "charged every time:"
            progress(f"  code under conditions on data is {said} {row.kernel.conditional_us:.1f} us")
        for peer, part in row.peers.items():
            progress(f"  {peer}: {_beside(part, row.kernel)}")
        record["modelled"].append(_modelled_record(row))
        status = status if row.valid else 1
    if here:
        copy = measure_copy_bandwidth()
        progress(_line(MEASURED_COLUMNS))
        for family, case in chosen:
            measured = _measure(family, case, here, copy)
            progress(_line(_measured_cells(measured)))
            for problem in measured["problems"]:
                progress(f"  not measured, {problem}")
            record["measured"].append(measured)
    if json_file:
        json_file.write_text(json.dumps(record, indent=1))
    return status


def _check(topologies: Sequence[str]) -> None:
    """UserError for a topology that is not known, and where the compiler is missing; `pallas_kernels` knows no UserError."""
    try:
        for topology in topologies:
            chip_of(topology)
        check_libtpu()
    except ValueError as error:
        raise UserError(str(error)) from error


def _accelerator() -> Implementation | None:
    """Which kernels the accelerator of this machine runs, if it has one. JAX is asked only then: libtpu without a TPU complains."""
    if not has_accelerator():
        return None
    return ACCELERATORS.get(jax.default_backend())


def _choose(filters: Sequence[str]) -> list[tuple[str, Case]]:
    known = [(family, case) for family, cases in families().items() for case in cases]
    chosen = [(family, case) for family, case in known if all(word in f"{family}/{case.label}" for word in filters)]
    if not chosen:
        labels = "\n  ".join(f"{family}/{case.label}" for family, case in known)
        raise UserError(f"no case holds {' and '.join(map(repr, filters))}; the cases are\n  {labels}")
    return chosen


def _model(chosen: Sequence[tuple[str, Case]], topologies: Sequence[str]) -> Iterator[Modelled]:
    for topology in topologies:
        for family, case in ((family, case) for family, case in chosen if not case.unscheduled):
            peers = [name for name in case.peers if importlib.util.find_spec(name)]
            costs = {name: _cost(family, case, name, topology) for name in ("tpu", "xla", *peers)}
            yield Modelled(family, case, topology, costs.pop("tpu"), costs.pop("xla"), costs)


def _cost(family: str, case: Case, implementation: str, topology: str) -> Cost | str:
    try:
        build = partial(build_case, family, case.label, implementation)
        return cost(build, case.floor_bytes, topology, floor_flops=case.floor_flops, rare=bool(case.rare))
    except RuntimeError as error:  # one program that the compiler refuses does not take the others with it
        return str(error)


def _measure(family: str, case: Case, here: Implementation, copy: float) -> dict[str, Any]:
    times = {"": _time(case, here), "xla_": _time(case, "xla"), "pytorch_": _time_pytorch(case)}
    us = times[""]
    per_second = 1e6 / us if isinstance(us, float) else None
    return {
        **_identity(family, case),
        "device": jax.devices()[0].device_kind,
        **{f"{name}measured_us": found if isinstance(found, float) else None for name, found in times.items()},
        "problems": [f"{name or 'kernel_'}: {found}".replace("_:", ":") for name, found in times.items() if isinstance(found, str)],
        "measured_floor_bytes_per_second": per_second and case.floor_bytes * per_second,
        "measured_floor_flops_per_second": per_second and case.floor_flops * per_second,
        "measured_copy_bytes_per_second": copy,
    }


def _time(case: Case, implementation: Implementation) -> float | str:
    """Microseconds, or why there are none, which does not take the other cases with it: too little memory, no room, no such kernel."""
    fn, args = case.build(implementation)
    try:
        return measure_us(fn, case.values(args))
    except (jax.errors.JaxRuntimeError, ValueError, AttributeError) as error:
        return str(error).partition("\n")[0]


def _time_pytorch(case: Case) -> float | str | None:
    """The same of the case's counterpart in PyTorch; None where there is none, or no PyTorch that sees the GPU."""
    if case.pytorch is None or importlib.util.find_spec("torch") is None:
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    try:
        return measure_pytorch_us(case.pytorch())
    except RuntimeError as error:  # out of memory, or no kernel for these widths
        return str(error).partition("\n")[0]


def _identity(family: str, case: Case) -> dict[str, Any]:
    return {
        "family": family,
        "kernel": case.kernel,
        "direction": case.direction,
        "case": case.name,
        "floor_bytes": case.floor_bytes,
        "floor_flops": case.floor_flops,
        "floor_note": case.floor_note,
    }


def _modelled_record(row: Modelled) -> dict[str, Any]:
    def part(found: Cost | str) -> dict[str, Any]:
        return {"problems": [found]} if isinstance(found, str) else dataclasses.asdict(found)

    peers = {name: part(found) for name, found in row.peers.items()}
    return {**_identity(row.family, row.case), "topology": row.topology, "pallas": part(row.kernel), "xla": part(row.xla), **peers}


def _modelled_cells(row: Modelled) -> list[str]:
    kernel, xla = row.kernel, row.xla
    cells = [f"{row.case.kernel}/{row.case.direction}", row.case.name, row.topology.partition(":")[0]]
    if isinstance(kernel, Cost):
        cells += [_number(kernel.modelled_us, kernel.valid), _number(kernel.floor_us), kernel.floor_by, _ratio(kernel)]
        cells += [f"{kernel.vmem_bytes / 2**20:.1f}", f"{kernel.compile_seconds:.1f}"]
    else:
        cells += ["-"] * 6
    return cells + ([_number(xla.modelled_us, xla.valid), _ratio(xla)] if isinstance(xla, Cost) else ["-", "-"])


def _beside(peer: Cost | str, kernel: Cost | str) -> str:
    if isinstance(peer, str) or not peer.valid:
        return f"not valid: {peer if isinstance(peer, str) else '; '.join(peer.problems)}"
    share = f"; the kernel takes {kernel.modelled_us / peer.modelled_us:.2f} of that" if isinstance(kernel, Cost) and kernel.valid else ""
    return f"{peer.modelled_us:.1f} us, {_ratio(peer)} of the floor{share}"


def _measured_cells(row: dict[str, Any]) -> list[str]:
    times = [row[name] for name in ("measured_us", "xla_measured_us", "pytorch_measured_us")]
    rates = [("measured_floor_bytes", 1e9), ("measured_copy_bytes", 1e9), ("measured_floor_flops", 1e12)]
    found = [(row[f"{name}_per_second"], unit) for name, unit in rates]
    cells = [
        *("-" if us is None else _number(us) for us in times),
        *("-" if rate is None else f"{rate / unit:.0f}" for rate, unit in found),
    ]
    return [f"{row['kernel']}/{row['direction']}", row["case"], row["device"], *cells]


def _ratio(found: Cost) -> str:
    return "not valid" if found.over_floor is None else f"{found.over_floor:.3f}"


def _number(us: float, valid: bool = True) -> str:
    return f"{us:.1f}" if valid else "not valid"


def _line(cells: Sequence[str]) -> str:
    widths = [24, 18, 8]
    return "  ".join(
        cell.ljust(widths[i]) if i < 3 else cell.rjust(max(11, len(COLUMNS[min(i, len(COLUMNS) - 1)]))) for i, cell in enumerate(cells)
    ).rstrip()
