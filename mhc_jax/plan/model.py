"""The modelled time of a compiled training step on one device of a TPU slice: what each part of the network takes, and what collectives do.

Pure: the module's text and listings in, figures out. Every figure is modelled, none measured. An operation takes the longer of

    its cycles   Pallas kernels and XLA's fusions by running their bundle listings (`static_cost`), others by the compiler's estimate;
                 grouped products, whose grids depend on data, by the work of their tiles
    its bytes    what it reads and writes in HBM, over the bandwidth

Loops multiply, nested ones too; of a conditional the costliest branch counts; what seams do for unusual data does not. Copies into VMEM and
collectives run beside what follows them until something waits for them: the wait is what they cost. `collectives` has the interconnect.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from mhc_jax.nn.expert_parallel import FURTHER_ROUNDS
from mhc_jax.plan.collectives import Collective, collective_in, cost_of
from mhc_jax.plan.parts import COLLECTIVES, PARTS, is_recomputed, op_name, part_of
from mhc_jax.plan.products import flops_of, grouped_product
from mhc_jax.plan.topologies import Topology
from pallas_kernels.static_cost.hlo import Instruction, Module
from pallas_kernels.static_cost.listing import parse_listing
from pallas_kernels.static_cost.machine import Run, run_listing
from pallas_kernels.static_cost.model import FREE, SMALL

# Bundles with scalar work that are run before an operation is charged by what it did until then; a minute or so for all of a large step.
KERNEL_STEPS, FUSION_STEPS = 2_000_000, 100_000
# Of the matrix units' peak, in `pallas_kernels.grouped`. Their grids depend on data, so no schedule can be run; this is the least that
# they reach with equal groups and a walk known beforehand (docs/kernels_grouped.md). v5e is taken to be as v5p, whose units it has.
GROUPED_EFFICIENCY = {"v5e": 0.90, "v5p": 0.90, "v6e": 0.77, "tpu7x": 0.78}
DATA = re.compile(r"^(dynamic-slice|slice|gather)$")


@dataclass(frozen=True)
class Operation:
    """One instruction with its loops' trips. Sums over all of its runs in a step."""

    name: str
    part: str
    kind: str  # "kernel", "xla", "estimate", "bytes", "ragged", "copy", or that of a collective
    times: int
    seconds: float  # busy; of a collective or copy also where something else runs meanwhile
    waited: float  # the part of it that the step's time shows
    hbm_bytes: float
    flops: float  # of matrix products; 0 in Pallas kernels
    recomputed: bool = False
    ici_bytes: float = 0.0


@dataclass
class StepTime:
    """The modelled time of a step and where it goes."""

    seconds: float = 0.0
    operations: list[Operation] = field(default_factory=list)
    notes: dict[str, None] = field(default_factory=dict)  # in order, each once

    def add(self, other: "StepTime", times: int = 1) -> None:
        """Runs `other` so many times after this."""
        self.seconds += times * other.seconds
        self.operations += [_repeated(operation, times) for operation in other.operations]

    def by_part(self) -> dict[str, float]:
        """Seconds of each part, the waits for collectives apart; their sum is the step's."""
        shares: dict[str, float] = defaultdict(float)
        for operation in self.operations:
            shares[COLLECTIVES if operation.ici_bytes or operation.part == COLLECTIVES else operation.part] += operation.waited
        return dict(shares)

    def flops_by_part(self) -> dict[str, float]:
        """FLOPs of the matrix products outside Pallas kernels."""
        shares: dict[str, float] = defaultdict(float)
        for operation in self.operations:
            shares[operation.part] += operation.flops
        return dict(shares)


def model_step(module: Module, listings: Mapping[str, str], topology: Topology, coordinates: tuple[tuple[int, ...], ...]) -> StepTime:
    """The modelled time of one run of a module on a device of a slice.

    Args:
      module: what the compiler made of the step.
      listings: the text of the bundle listing of each instruction that has one.
      topology: the slice.
      coordinates: of the chip of each partition of the module.
    """
    schedule = _Schedule(module, listings, topology, coordinates)
    total = schedule.computation(module.entry)
    total.notes = schedule.notes
    return total


class _Schedule:
    """Instructions run one after the other; copies and collectives beside them, each kind on a channel of its own."""

    def __init__(self, module: Module, listings: Mapping[str, str], topology: Topology, coordinates: tuple[tuple[int, ...], ...]) -> None:
        self.module, self.topology, self.coordinates = module, topology, coordinates
        self.chip = topology.kind.chip
        self.clock = self.chip.clock_ghz * 1e9
        self.listings = listings
        self.runs: dict[tuple[str, bool], Run] = {}
        self.notes: dict[str, None] = {}
        self.done: dict[str, StepTime] = {}

    def computation(self, name: str) -> StepTime:
        if name not in self.done:
            self.done[name] = self._run(name)
        return self.done[name]

    def _run(self, name: str) -> StepTime:
        total, steps = StepTime(), self.module.instructions[name]
        channels = {"copy": 0.0, "collective": 0.0, "sparse core": 0.0}
        arrivals: dict[str, tuple[float, int]] = {}  # of what has been started: when it is there, and its place among the operations

        def started(step: Instruction, channel: str, operation: Operation) -> None:
            begun = max(total.seconds, channels[channel])
            channels[channel] = begun + operation.seconds
            arrivals[step.name] = (channels[channel], len(total.operations))
            total.operations.append(operation)

        def wait(step: Instruction) -> bool:
            """Waits for what an instruction's operands come from, if that has been started here."""
            source = _source(step, steps, arrivals)
            if source is None:
                return False
            arrival, place = arrivals[source]
            if arrival > total.seconds:
                operation = total.operations[place]
                total.operations[place] = replace(operation, waited=operation.waited + arrival - total.seconds)
                total.seconds = arrival
            return True

        for step in self.module.computations[name]:
            inner = collective_in(step, self.module)
            if step.opcode in FREE:
                continue
            if "-done" in step.opcode or step.name.startswith("async-collective-done"):
                wait(step)
            elif inner is not None and _continues(step, steps, arrivals):
                arrivals[step.name] = arrivals[_source(step, steps, arrivals) or ""]  # what started goes on beside this one's own work
                self.step(step, name, total)
            elif inner is not None:
                moved = cost_of(inner, step, self.module, self.topology, self.coordinates)
                operation = self.of_collective(step, name, moved)
                started(step, "sparse core" if step.opcode == "call-start" else "collective", operation)
                if not (step.opcode.endswith("-start") or step.name.startswith("async-collective-start")):
                    arrival, place = arrivals.pop(step.name)
                    total.operations[place] = replace(operation, waited=arrival - total.seconds)
                    total.seconds = arrival
                if step.opcode == "fusion" and not step.name.startswith("async-collective"):
                    self.step(step, name, total)  # what is fused with it
            elif step.opcode.endswith("-start"):
                moved_bytes = self.copied(step)
                seconds, part = moved_bytes / self.chip.hbm_bytes_per_second, part_of(step, name, self.module)
                started(step, "copy", Operation(step.name, part, "copy", 1, seconds, 0.0, moved_bytes, 0.0))
            else:
                self.step(step, name, total)
        return total

    def copied(self, start: Instruction) -> int:
        """Bytes to and from HBM of what runs beside the core: a copy, or what a sparse core gathers or lays out anew."""
        if start.opcode == "call-start":
            root = next(step for step in self.module.computations[start.called("to_apply")[0]] if step.root)
            return 2 * _in_hbm(root)
        size = sum(sorted(size for size, space in start.arrays if space != 2 and size > 4)[:1])
        return size * _hbm_ends(start)

    def of_collective(self, step: Instruction, computation: str, moved: Collective) -> Operation:
        part = part_of(step, computation, self.module)
        return Operation(step.name, part, moved.kind, 1, moved.seconds, 0.0, 0.0, 0.0, is_recomputed(step, self.module), moved.bytes or 1)

    def step(self, step: Instruction, computation: str, total: StepTime) -> None:
        further = FURTHER_ROUNDS in op_name(step)
        if further and step.opcode in ("conditional", "while"):
            self.notes["further rounds of the exchange with experts, which only uneven routing needs, are not counted"] = None
        if step.opcode == "while":
            if further:
                return
            trips = self.module.trip_count(step, computation)
            if trips is None:
                self.notes[f"how often the loop {step.name} runs depends on data: once is counted"] = None
            total.add(self.computation(step.called("body")[0]), trips or 1)
        elif step.opcode == "conditional":
            branches = step.called("branch_computations") or step.called("true_computation") + step.called("false_computation")
            # Without further rounds the branch with less in it is taken; the compiler moves into both what only they use.
            taken = min if further else max
            total.add(taken((self.computation(branch) for branch in branches), key=lambda branch: branch.seconds))
        elif step.opcode == "call":
            total.add(self.computation(step.called("to_apply")[0]))
        elif (operation := self.operation(step, computation)) is not None:
            total.operations.append(operation)
            total.seconds += operation.waited

    def operation(self, step: Instruction, computation: str) -> Operation | None:
        part, recomputed = part_of(step, computation, self.module), is_recomputed(step, self.module)
        if grouped := grouped_product(step, computation, self.module):
            seconds = max(
                grouped.done / (GROUPED_EFFICIENCY[self.chip.name] * self.chip.flops_per_second),
                grouped.bytes / self.chip.hbm_bytes_per_second,
            )
            return Operation(step.name, part, "grouped", 1, seconds, seconds, grouped.bytes, grouped.flops, recomputed)
        flops, moved = flops_of(step, computation, self.module), self.traffic(step, computation)
        kernel = '"tpu_custom_call"' in step.attributes
        run = self.run(self.listings[step.name], kernel, part) if step.name in self.listings and not self.is_collective(step) else None
        estimate = (step.estimated_cycles or 0) / self.clock
        if run and not run.problems:
            kind, seconds, moved = "kernel" if kernel else "xla", run.cycles / self.clock, run.hbm_bytes
        elif run and run.cut and run.hbm_bytes and (kernel or not flops):
            # Cut short, but what it moves is known: the rest takes as long a byte.
            kind, seconds = "cut", run.cycles / self.clock * max(1.0, moved / run.hbm_bytes)
            if kernel:
                self.notes[f"{step.name} is charged for the part of its schedule that was run, by the bytes that it moves in all"] = None
        else:
            kind, seconds = "estimate", estimate
        if moved <= SMALL and not seconds:
            return None
        if (by_bytes := moved / self.chip.hbm_bytes_per_second) > seconds:
            kind, seconds = "bytes", by_bytes
        return Operation(step.name, part, kind, 1, seconds, seconds, moved, flops, recomputed)

    def is_collective(self, step: Instruction) -> bool:
        return collective_in(step, self.module) is not None

    def run(self, text: str, kernel: bool, part: str) -> Run:
        """The schedule of an operation on the busiest core; its bytes are those of all cores.

        What seams do only where the data is unusual is left out. What attention skips is what documents hide: one document is meant.
        """
        key = (text, part == PARTS["connections"])
        if key not in self.runs:
            listing = parse_listing(text)
            found = [
                run_listing(
                    listing,
                    bytes_per_cycle=self.chip.hbm_bytes_per_second / self.chip.cores / self.clock,
                    branch_delay=self.chip.branch_delay,
                    core=core,
                    conditions=not key[1],
                    most_steps=KERNEL_STEPS if kernel else FUSION_STEPS,
                )
                for core in range(self.chip.cores if kernel else 1)  # XLA gives its cores equal parts
            ]
            busiest = max(found, key=lambda run: run.cycles)
            moved = sum(run.hbm_bytes for run in found) * self.chip.cores // len(found)
            self.runs[key] = replace(busiest, hbm_bytes=moved)
        return self.runs[key]

    def traffic(self, step: Instruction, computation: str) -> int:
        """Bytes of operands and results in HBM. Of an array that a fusion only slices or updates in place, the slice counts."""
        made = self.module.instructions[computation]
        inside = self.module.computations.get(step.called("calls")[0], []) if step.opcode == "fusion" else []
        aliased = "output_to_operand_aliasing" in step.attributes or any(inner.opcode == "dynamic-update-slice" for inner in inside)
        total = 0
        for place, name in enumerate(step.operands):
            whole = _in_hbm(made[name]) if name in made else 0
            total += min(whole, _sliced(place, inside)) if inside else whole
        if step.opcode == "dynamic-update-slice" or aliased:
            updates = [inner for inner in (*inside, step) if inner.opcode == "dynamic-update-slice"]
            tables = {inner.name: inner for inner in inside} or made
            return min(total, 2 * sum(sum(s for s, _ in tables[u.operands[1]].arrays) for u in updates if u.operands[1] in tables)) or total
        if step.opcode in ("dynamic-slice", "slice"):
            return 2 * _in_hbm(step)
        return total + _in_hbm(step)


def _repeated(operation: Operation, times: int) -> Operation:
    if times == 1:
        return operation
    return replace(
        operation,
        times=operation.times * times,
        seconds=operation.seconds * times,
        waited=operation.waited * times,
        hbm_bytes=operation.hbm_bytes * times,
        flops=operation.flops * times,
        ici_bytes=operation.ici_bytes * times,
    )


def _continues(step: Instruction, steps: Mapping[str, Instruction], arrivals: Mapping[str, tuple[float, int]]) -> bool:
    return step.opcode == "fusion" and _source(step, steps, arrivals) is not None


def _source(step: Instruction, steps: Mapping[str, Instruction], arrivals: Mapping[str, tuple[float, int]]) -> str | None:
    """Which started instruction an instruction's operands come from, directly or as elements of its result."""
    for name in step.operands:
        while name not in arrivals and name in steps and steps[name].opcode in ("get-tuple-element", "bitcast"):
            name = steps[name].operands[0]
        if name in arrivals:
            return name
    return None


def _in_hbm(step: Instruction) -> int:
    return sum(size for size, space in step.arrays if space == 0)


def _hbm_ends(start: Instruction) -> int:
    """How many of a copy's two ends lie in HBM."""
    ends = [space for size, space in start.arrays if space != 2 and size > 4]
    return ends[:2].count(0)


def _sliced(place: int, inside: list[Instruction]) -> int:
    """Bytes that a fusion reads of its operand number `place`: all, or the slices where nothing else is done with it."""
    own = next((inner for inner in inside if inner.opcode == "parameter" and inner.operands == (str(place),)), None)
    if own is None:
        return 2**62
    users = [inner for inner in inside if own.name in inner.operands]
    if users and all(DATA.match(user.opcode) for user in users):
        return sum(sum(size for size, _ in user.arrays) for user in users)
    return 2**62
