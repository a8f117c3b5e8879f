"""The modelled cost of a compiled TPU module: walks its instructions, runs the bundle listing of each, checks the sum against the floor.

Pure: text in, figures out. The compiler is run by `child`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Literal

from pallas_kernels.static_cost.chips import Chip
from pallas_kernels.static_cost.hlo import Instruction, Module
from pallas_kernels.static_cost.listing import Listing, parse_listing
from pallas_kernels.static_cost.machine import run_listing

SMALL = 4096  # bytes: an operation without any cost whose result is no larger is scalar bookkeeping
FREE = frozenset(("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "add-dependency"))
MOVES = frozenset(("reshape", "concatenate", "slice", "transpose", "dynamic-update-slice"))  # on v5p libtpu lists some of these nowhere
FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape")
COLLECTIVE = re.compile(r"(all-|reduce-scatter|collective-|ragged-all-to-all|send|recv)")
SEMAPHORE_SPACE = 2


@dataclass(frozen=True)
class OperationCost:
    """One instruction that takes time, loops included: `times` runs of it."""

    name: str
    kind: str  # "kernel": Pallas; "xla": its bundle listing was run; "estimate": the compiler's own figure; "copy": HBM to or from VMEM
    times: int
    modelled_us: float
    cycles: int  # of the busiest core; 0 for copies
    stall_cycles: int  # of these, waiting for DMAs
    hbm_bytes: int | None  # None where only an estimate of the time is known
    vmem_bytes: int  # scoped VMEM while it runs
    estimated_cycles: int | None = None  # the compiler's own estimate where it makes one, which it decides fusions by; for comparison alone


@dataclass(frozen=True)
class Cost:
    """The modelled cost of one call on one device. No figure here is a measurement.

    `over_floor` is `modelled_us / floor_us`, or None where `problems` says why there is no such ratio.
    """

    topology: str
    modelled_us: float
    kernel_us: float  # the part of Pallas kernels
    hbm_bytes: int | None  # read and written, all operations; None where some of them have only an estimate
    floor_bytes: int
    floor_us: float  # what `floor_by` says takes the longer: the bytes at the bandwidth, or the FLOPs at the matrix units' peak
    over_floor: float | None
    vmem_bytes: int  # the most that an operation reserves
    floor_flops: int = 0
    floor_by: Literal["bytes", "flops"] = "bytes"
    hbm_temp_bytes: int = 0  # temporaries that the module allocates in HBM
    compile_seconds: float = 0.0  # lowering and compiling, the dump included
    conditional_us: float | None = None  # `modelled_us` with all code under conditions on data; None where there is none
    problems: tuple[str, ...] = ()
    assumptions: tuple[str, ...] = ()
    operations: tuple[OperationCost, ...] = ()

    @property
    def valid(self) -> bool:
        """Whether the figures stand for the program."""
        return not self.problems


@dataclass
class _Total:
    us: float = 0.0
    hbm_bytes: int = 0
    bytes_known: bool = True
    operations: list[OperationCost] = field(default_factory=list)

    def add(self, other: "_Total", times: int = 1) -> None:
        self.us += other.us * times
        self.hbm_bytes += other.hbm_bytes * times
        self.bytes_known &= other.bytes_known
        self.operations += [
            replace(
                row,
                times=row.times * times,
                modelled_us=row.modelled_us * times,
                cycles=row.cycles * times,
                stall_cycles=row.stall_cycles * times,
                hbm_bytes=None if row.hbm_bytes is None else row.hbm_bytes * times,
                estimated_cycles=None if row.estimated_cycles is None else row.estimated_cycles * times,
            )
            for row in other.operations
        ]


def model_cost(
    module: Module,
    listings: Mapping[str, str],
    chip: Chip,
    topology: str,
    floor_bytes: int,
    rare: bool = False,
    floor_flops: int = 0,
) -> Cost:
    """Adds up a module.

    Args:
      module: what the compiler made of the program.
      listings: the text of the packed-bundle listing of each instruction that has one, by the instruction's name.
      chip: clock, bandwidth and cores.
      topology: for the record.
      floor_bytes: the fewest bytes that HBM has to move on one device.
      rare: whether code of kernels under conditions on data is left out. Otherwise it is charged every time.
      floor_flops: the fewest FLOPs that the matrix units have to do on one device.
    """
    walk = _Walk(module, listings, chip, conditions=not rare)
    total = walk.computation(module.entry)
    conditional_us = (
        max(total.us, _Walk(module, listings, chip, conditions=rare).computation(module.entry).us) if walk.met_condition else None
    )
    if conditional_us is not None and not rare:
        total.us = conditional_us
    bytes_per_us = chip.hbm_bytes_per_second / 1e6
    bytes_us, flops_us = floor_bytes / bytes_per_us, floor_flops / (chip.flops_per_second / 1e6)
    floor_us = max(bytes_us, flops_us)
    problems = list(walk.problems)
    if problems:
        pass  # what is not counted cannot be compared
    elif total.bytes_known and total.hbm_bytes < floor_bytes:
        problems.append(
            f"the program moves {total.hbm_bytes:,} bytes through HBM, below the floor of {floor_bytes:,}: "
            f"the floor counts what need not move, or the model misses a DMA"
        )
    elif total.us < floor_us:
        problems.append(f"the modelled time of {total.us:.2f} us is below the floor of {floor_us:.2f} us")
    return Cost(
        topology=topology,
        modelled_us=total.us,
        kernel_us=sum(row.modelled_us for row in total.operations if row.kind == "kernel"),
        hbm_bytes=total.hbm_bytes if total.bytes_known else None,
        floor_bytes=floor_bytes,
        floor_us=floor_us,
        over_floor=None if problems else total.us / floor_us,
        floor_flops=floor_flops,
        floor_by="flops" if flops_us > bytes_us else "bytes",
        vmem_bytes=max((row.vmem_bytes for row in total.operations), default=0),
        problems=tuple(problems),
        assumptions=tuple(sorted(walk.assumptions)),
        conditional_us=conditional_us,
        operations=tuple(sorted(total.operations, key=lambda row: -row.modelled_us)),
    )


class _Walk:
    """Instructions run one after the other, asynchronous copies beside them."""

    def __init__(self, module: Module, listings: Mapping[str, str], chip: Chip, conditions: bool) -> None:
        self.module, self.listings, self.chip, self.conditions = module, listings, chip, conditions
        self.met_condition = False
        self.problems: dict[str, None] = {}  # in order, each once
        self.assumptions: set[str] = set()
        self.bytes_per_us = chip.hbm_bytes_per_second / 1e6
        self.parsed = cache(lambda text: parse_listing(text))

    def computation(self, name: str) -> _Total:
        total, channel_free = _Total(), 0.0
        arrivals: dict[str, float] = {}
        for step in self.module.computations[name]:
            if step.opcode.endswith("-start") and not self.is_collective(step):
                size = _moved(step)
                channel_free = arrivals[step.name] = max(total.us, channel_free) + size / self.bytes_per_us
                total.hbm_bytes += size
                row = OperationCost(step.name, "copy", 1, 0.0, 0, 0, size, 0)  # its time shows where something waits for it
                total.operations += [row] if size > SMALL else []
            elif step.opcode.endswith("-done") and step.operands[0] in arrivals:
                total.us = max(total.us, arrivals[step.operands[0]])
            else:
                self.step(step, name, total)
        # What a prefetch and a kernel move at the same time shares one channel.
        total.us = max(total.us, channel_free, total.hbm_bytes / self.bytes_per_us)
        return total

    def step(self, step: Instruction, computation: str, total: _Total) -> None:
        if step.opcode == "while":
            trips = self.module.trip_count(step, computation)
            if trips is None:
                self.problems[f"how often the loop {step.name} runs is not known"] = None
            total.add(self.computation(step.called("body")[0]), 1 if trips is None else trips)
        elif step.opcode == "conditional":
            branches = step.called("branch_computations") or step.called("true_computation") + step.called("false_computation")
            total.add(max((self.computation(branch) for branch in branches), key=lambda branch: branch.us))
            self.assumptions.add(f"of the branches of {step.name} the costliest is charged")
        elif step.opcode == "call":
            total.add(self.computation(step.called("to_apply")[0]))
        elif self.is_collective(step):
            self.problems[f"{step.name} moves data between devices, which is not modelled"] = None
        elif step.opcode not in FREE:
            row = self.operation(step, computation)
            if row:
                total.add(_Total(row.modelled_us, row.hbm_bytes or 0, row.hbm_bytes is not None, [row]))

    def is_collective(self, step: Instruction) -> bool:
        wrapped = (
            [inner for name in step.called("calls") for inner in self.module.computations.get(name, ())]
            if step.opcode == "async-start"
            else []
        )
        return any(COLLECTIVE.match(inner.opcode) for inner in (step, *wrapped))

    def operation(self, step: Instruction, computation: str) -> OperationCost | None:
        kernel = '"tpu_custom_call"' in step.attributes
        if step.name in self.listings:
            row, reasons = self.run(step, "kernel" if kernel else "xla")
            if not reasons or kernel:
                self.problems |= {f"{step.name}: {reason}": None for reason in reasons}
                return row
            self.assumptions.add(f"{step.name}: the compiler's estimate of the time, because {reasons[0]}")
        if kernel:
            self.problems[f"{step.name}: the compiler dumped no bundle listing of this kernel"] = None
        elif (cycles := step.estimated_cycles) is not None:
            return OperationCost(step.name, "estimate", 1, cycles / self.chip.clock_ghz / 1e3, cycles, 0, None, step.vmem_bytes, cycles)
        elif step.opcode in MOVES:
            updates = step.opcode == "dynamic-update-slice"  # in place: the array around what it writes stays where it is
            copied = self.module.instructions[computation][step.operands[1]] if updates else step
            moved = 2 * sum(size for size, _ in copied.arrays)
            what = "what it writes" if updates else "its result"
            self.assumptions.add(f"{step.name}: a {step.opcode} without a listing is charged as reading and writing {what} once")
            return OperationCost(step.name, "copy", 1, moved / self.bytes_per_us, 0, 0, moved, step.vmem_bytes)
        elif sum(size for size, _ in step.arrays) > SMALL and not any(f'"{call}"' in step.attributes for call in FREE_CALLS):
            self.problems[f"{step.name} ({step.opcode}) has neither a bundle listing nor an estimate"] = None
        return None

    def run(self, step: Instruction, kind: str) -> tuple[OperationCost, list[str]]:
        """Runs an instruction's listing on every core of the device. The cores share its bandwidth evenly."""
        listing: Listing = self.parsed(self.listings[step.name])
        share = self.chip.hbm_bytes_per_second / self.chip.cores / (self.chip.clock_ghz * 1e9)
        conditions = self.conditions or kind != "kernel"
        runs = [
            run_listing(listing, bytes_per_cycle=share, branch_delay=self.chip.branch_delay, core=core, conditions=conditions)
            for core in range(self.chip.cores)
        ]
        busiest = max(runs, key=lambda run: run.cycles)
        moved = sum(run.hbm_bytes for run in runs)
        reasons = [problem for run in runs for problem in run.problems]
        if any(run.met_condition for run in runs) and not reasons:
            self.met_condition |= kind == "kernel"
            self.assumptions.add(f"{step.name}: code under conditions on data is {'charged every time' if conditions else 'left out'}")
        us = busiest.cycles / self.chip.clock_ghz / 1e3
        row = OperationCost(
            step.name, kind, 1, us, round(busiest.cycles), round(busiest.stall_cycles), moved, step.vmem_bytes, step.estimated_cycles
        )
        return row, list(dict.fromkeys(reasons))


def _moved(start: Instruction) -> int:
    """Bytes that an asynchronous copy or slice moves through HBM: its result, once for each end that lies in HBM."""
    ends = [(size, space) for size, space in start.arrays if space != SEMAPHORE_SPACE and size > 4]
    if not ends:
        return 0
    size = min(size for size, _ in ends)
    return size * [space for _, space in ends[:2]].count(0)
