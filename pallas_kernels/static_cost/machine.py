"""Runs the control flow of a bundle listing: every loop trip, every predicated DMA, every wait, on a core whose DMAs take time.

The scalar program of a kernel is in the listing in full, so loops need no guessed trip counts: they are executed. Bundles without scalar
work that matters are skipped in one step, which keeps this at a few operations a loop trip. One bundle takes one cycle. HBM is one channel
that serves DMAs in the order in which they are started, at the bandwidth given, without latency. A wait lasts until the DMAs it waits for
have ended. Nothing else stalls.
"""

import re
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass

from pallas_kernels.static_cost.control import guards_of, has_effect, is_strange, memories_of, needed_values
from pallas_kernels.static_cost.listing import Listing, Operation
from pallas_kernels.static_cost.scalar import Address, Value, compute, signed

GRANULE = 32  # bytes
MOST_STEPS = 20_000_000  # executed bundles with scalar work, some minutes; a kernel that gets here does not end

DMA_BETWEEN = re.compile(r"dma\.(hbm|vmem|smem)_to_(hbm|vmem|smem)$")


@dataclass(frozen=True)
class Run:
    """What one core did."""

    cycles: float  # until its last bundle has run and its last DMA has ended
    stall_cycles: float  # of these, waiting for DMAs
    hbm_bytes: int  # read from and written to HBM
    problems: tuple[str, ...]  # why the figures are not the kernel's; empty if they are
    met_condition: bool  # whether it met a condition on data, and `conditions` decided
    cut: bool = False  # whether it was stopped before its end, and the figures are those up to there


class _CannotTell(Exception):
    """Control depends on what only the data says."""


class _Cut(_CannotTell):
    """It ran for as many steps as it was given."""


def run_listing(
    listing: Listing, *, bytes_per_cycle: float, branch_delay: int, core: int = 0, conditions: bool = True, most_steps: int = MOST_STEPS
) -> Run:
    """Executes a listing on one core.

    Args:
      listing: the kernel.
      bytes_per_cycle: HBM bandwidth of this core over its clock.
      branch_delay: bundles after a branch that run before it takes effect.
      core: what the kernel reads as its core's number.
      conditions: whether code under a condition on data is run every time or never.
      most_steps: bundles with scalar work to run before it is cut.
    """
    machine = _Machine(listing, bytes_per_cycle, branch_delay, core, conditions)
    problems, cut = [], False
    try:
        machine.run(most_steps)
    except _CannotTell as reason:
        cut = isinstance(reason, _Cut)
        strangers = sorted({operation.name for operations in machine.work for operation in operations if is_strange(operation)})
        problems.append(f"{reason} (operations that the model does not know: {', '.join(strangers)})" if strangers else str(reason))
    end = max(machine.time, machine.channel_free)
    return Run(end, machine.stalls, machine.hbm_bytes, tuple(problems), machine.met_condition, cut)


class _Semaphore:
    """A DMA semaphore: what has arrived, and what will."""

    def __init__(self) -> None:
        self.count = 0
        self.coming: deque[tuple[float, int]] = deque()  # (time, granules), in order of time

    def time_when(self, needed: int) -> float | None:
        """The time at which `needed` granules have arrived, 0 if they have; None if nobody sends them."""
        time = 0.0
        while self.count < needed:
            if not self.coming:
                return None
            time, granules = self.coming.popleft()
            self.count += granules
        return time


class _Machine:
    def __init__(self, listing: Listing, bytes_per_cycle: float, branch_delay: int, core: int, conditions: bool) -> None:
        self.listing, self.bytes_per_cycle, self.branch_delay, self.core = listing, bytes_per_cycle, branch_delay, core
        needed = needed_values(listing)
        self.work = [
            [operation for operation in bundle if has_effect(operation) or operation.result in needed] for bundle in listing.bundles
        ]
        self.guards = guards_of(listing, conditions)
        self.memories = memories_of(listing)
        self.places = [place for place, operations in enumerate(self.work) if operations]
        self.values: dict[str, Value] = {}
        self.registers: dict[str, Value] = {}  # what a phi reads: the register that its operands share
        self.memory: dict[str, Value] = {}  # scalar memory at constant places: spills
        self.semaphores: dict[Address, _Semaphore] = {}
        self.time = self.stalls = self.channel_free = 0.0
        self.hbm_bytes = 0
        self.met_condition = False
        self.jump: tuple[int, int] | None = None  # (last bundle before it, where to)

    def run(self, most_steps: int) -> None:
        place, end = 0, len(self.work)
        for _ in range(most_steps):
            following = bisect_left(self.places, place)
            event = self.places[following] if following < len(self.places) else end
            if self.jump and event > self.jump[0]:
                self.time += self.jump[0] + 1 - place
                place, self.jump = self.jump[1], None
                continue
            self.time += event - place
            if event == end:
                return
            for operation in self.work[event]:
                self.execute(operation, event)
            self.time += 1
            place = event + 1
        raise _Cut("the kernel does not end within the steps that the model runs")

    def execute(self, operation: Operation, place: int) -> None:
        name = operation.name
        if name == "sphi":
            self.values[operation.result or ""] = self.registers.get(_register(operation.result))
            return
        active = self.active(operation)
        if name == "sbr.rel":
            self.branch(operation, active, place)
        elif name.startswith("dma.") and name != "dma.done.wait":
            self.start_dma(operation, active)
        elif name == "dma.done.wait":
            self.wait(operation, active)
        elif name in ("vsyncadd", "vsyncpa"):
            self.set_semaphore(operation, active)
        elif name == "sst":
            self.store(operation, active)
        elif operation.result:
            self.assign(operation, active)

    def assign(self, operation: Operation, active: bool | None) -> None:
        result = operation.result or ""
        if active:
            value = self.result_of(operation)
        elif active is None:
            value = None
        elif operation.otherwise:
            value = self.values.get(operation.otherwise)
        else:
            return  # the register keeps what it holds
        if value is None and result in self.guards:
            self.met_condition = True
            value = self.guards[result]
        self.values[result] = value
        if not operation.name.startswith("int_to_ptr"):  # that names what a register holds anew, under no predicate, and writes nothing
            self.registers[_register(result)] = value

    def result_of(self, operation: Operation) -> Value:
        if operation.name == "sld":
            return self.core if "core_id" in operation.words else self.memory.get(operation.operands[0])
        if operation.name == "spop.drf":
            return self.values.get(operation.operands[0])
        if operation.name == "scalar_select":
            chosen = self.value(operation.named["predicate"])
            return None if chosen is None else self.value(operation.named["on_true" if chosen else "on_false"])
        if not operation.operands or operation.name.startswith("inlined_call_operand"):
            return None
        return compute(operation, [self.value(operand) for operand in operation.operands])

    def branch(self, operation: Operation, active: bool | None, place: int) -> None:
        target = self.listing.index.get(int(operation.named.get("target", -1)))
        if target is None:
            raise _CannotTell(f"the target of the branch {operation.result} is not in the listing")
        if active is None and target <= place:
            raise _CannotTell("the trip count of a loop depends on data")
        if active is None:
            raise _CannotTell("where a branch goes depends on data")
        if active and self.jump:
            raise _CannotTell(f"the branch {operation.result} stands in the delay of another")
        if active:
            self.jump = (place + self.branch_delay, target)

    def start_dma(self, operation: Operation, active: bool | None) -> None:
        if active is False:
            return
        if active is None:
            raise _CannotTell("whether a DMA is started depends on data")
        granules = self.value(operation.named.get("size_in_granules", ""))
        semaphore = self.semaphore(operation.named.get("dst_syncflagno", ""))
        if not isinstance(granules, int):
            raise _CannotTell("the size of a DMA depends on data")
        size = granules * GRANULE * _passes_over_hbm(operation, self.memories)
        self.hbm_bytes += size
        arrival = self.time
        if size:
            arrival = self.channel_free = max(self.time, self.channel_free) + size / self.bytes_per_cycle
        semaphore.coming.append((arrival, granules))

    def wait(self, operation: Operation, active: bool | None) -> None:
        if active is False:
            return
        granules = self.value(operation.operands[1])
        if active is None or not isinstance(granules, int):
            raise _CannotTell("what a wait waits for depends on data")
        arrival = self.semaphore(operation.operands[0]).time_when(granules)
        if arrival is None:
            raise _CannotTell("a wait is for something that this kernel does not start, such as another device's DMA")
        if arrival > self.time:
            self.stalls += arrival - self.time
            self.time = arrival

    def set_semaphore(self, operation: Operation, active: bool | None) -> None:
        if active is False:
            return
        semaphore, amount = self.semaphore(operation.operands[0]), self.value(operation.operands[1])
        if active is None or not isinstance(amount, int):
            raise _CannotTell("the value of a semaphore depends on data")
        semaphore.count = signed(amount) + (semaphore.count if operation.name == "vsyncadd" else 0)

    def semaphore(self, operand: str) -> _Semaphore:
        address = self.value(operand)
        if not isinstance(address, Address):
            raise _CannotTell("which semaphore is used depends on data")
        return self.semaphores.setdefault(address, _Semaphore())

    def store(self, operation: Operation, active: bool | None) -> None:
        place = operation.operands[0]
        if active is False:
            return
        if "%" in place:  # anywhere but in a spill slot, which only constant addresses name
            self.memory = {key: value for key, value in self.memory.items() if "_spill" in key}
            return
        self.memory[place] = self.value(operation.operands[1]) if active else None

    def active(self, operation: Operation) -> bool | None:
        if operation.predicate is None:
            return True
        value = self.values.get(operation.predicate)
        return None if value is None else bool(value) != operation.negated

    def value(self, text: str) -> Value:
        if text.startswith("%"):
            return self.values.get(text)
        if text.lstrip("-").isdigit():
            return signed(int(text))
        if text.startswith("0x"):
            return signed(int(text, 16))
        address = re.fullmatch(r"\[(#\w+)(?: \+ \$?(0x[0-9a-f]+|\d+))?\]", text)
        return Address(address[1], int(address[2] or "0", 0)) if address else None


def _register(name: str | None) -> str:
    """The register of a value: "s9" of "%s1420_s9"."""
    return (name or "").rpartition("_")[2]


def _passes_over_hbm(operation: Operation, memories: dict[str, str]) -> int:
    """How often a DMA's bytes cross HBM's pins: its mnemonic says so, or a comment, or its pointers."""
    between = DMA_BETWEEN.match(operation.name)
    if between:
        return between.groups().count("hbm")
    for word in operation.words:
        if "-to-" in word:
            return word.split("-to-").count("hbm")
    ends = [memories.get(operation.named.get(end, "")) for end in ("src", "dst")]
    if None not in ends:
        return ends.count("hbm")
    raise _CannotTell(f"between which memories {operation.name} copies is not known")
