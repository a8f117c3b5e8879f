"""Reads the text of a module that XLA compiled for a TPU: computations, instructions, trip counts of loops. No costs: `model` has those."""

import re
from dataclasses import dataclass
from functools import cached_property

ELEMENT_BITS = {"pred": 8, "token": 0, "opaque": 0}
ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^{}]*)\})?")
COMPUTATION = re.compile(r"^(ENTRY )?%?([^\s(]+) \([^\n]*\{\n(.*?)^\}", re.M | re.S)


@dataclass(frozen=True)
class Instruction:
    """One instruction of a computation."""

    name: str
    opcode: str
    shape: str  # "f32[8192,1024]{1,0:T(8,128)S(1)}", or a tuple of such
    operands: tuple[str, ...]
    attributes: str  # the rest of its line
    root: bool

    @property
    def arrays(self) -> list[tuple[int, int]]:
        """(bytes, memory space) of each array of the result; space 0 is HBM, 1 VMEM. Padding of tiles is not counted."""
        return [_array(*match.groups()) for match in ARRAY.finditer(self.shape)]

    def called(self, role: str) -> list[str]:
        """Names of the computations that it calls in a role: "body", "condition", "to_apply", "branch_computations"."""
        found = re.search(rf"\b{role}=(\{{[^}}]*\}}|%[^\s,]+)", self.attributes)
        return re.findall(r"%([^\s,{}]+)", found[1]) if found else []

    @property
    def estimated_cycles(self) -> int | None:
        """The compiler's own estimate; None where it has none. It writes sentinels above 10^12 for 'unknown'."""
        found = [int(number) for number in re.findall(r'"estimated_cycles":"(\d+)"', self.attributes)]
        return sum(found) if found and max(found) < 10**12 else None

    @property
    def vmem_bytes(self) -> int:
        """VMEM that is reserved for it while it runs."""
        scoped = re.search(r'"used_scoped_memory_configs":\[(.*?)\]', self.attributes)
        entries = re.findall(r'"memory_space":"1","offset":"(\d+)","size":"(\d+)"', scoped[1]) if scoped else []
        return max((int(size) for _, size in entries), default=0)


@dataclass(frozen=True)
class Module:
    """A scheduled module: instructions stand in the order in which they run."""

    computations: dict[str, list[Instruction]]
    entry: str

    @cached_property
    def instructions(self) -> dict[str, dict[str, Instruction]]:
        """The instructions of each computation by name."""
        return {name: {step.name: step for step in steps} for name, steps in self.computations.items()}

    def trip_count(self, loop: Instruction, computation: str) -> int | None:
        """How often the body of a while instruction of `computation` runs; None if the module does not say.

        Read where XLA writes it, or from the shape that `lax.scan` and `fori_loop` compile to: a counter that starts at a constant, grows
        by a constant, and is compared with a constant.
        """
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
        if known:
            return int(known[1])
        (condition,), (body,) = loop.called("condition"), loop.called("body")
        test = next(step for step in self.computations[condition] if step.root)
        if test.opcode != "compare" or "direction=LT" not in test.attributes:
            return None
        counter = self._element(test.operands[0], condition)
        bound = self._constant(test.operands[1], condition, loop, computation)
        if counter is None or bound is None:
            return None
        start = self._initial(counter, loop, computation)
        result = next(step for step in self.computations[body] if step.root)
        growth = self._source(result.operands[counter], body) if result.opcode == "tuple" else None
        if start is None or growth is None or growth.opcode != "add":
            return None
        terms = [term for term in growth.operands if self._element(term, body) != counter]
        step = self._constant(terms[0], body, loop, computation) if len(terms) == 1 else None
        return max(0, -(-(bound - start) // step)) if step and step > 0 else None

    def _source(self, name: str, computation: str) -> Instruction | None:
        """The instruction that makes a value, past copies of it."""
        step = self.instructions[computation].get(name)
        while step and step.opcode in ("copy", "bitcast"):
            step = self.instructions[computation].get(step.operands[0])
        return step

    def _element(self, name: str, computation: str) -> int | None:
        """Which element of the loop's state a value is."""
        step = self._source(name, computation)
        if step is None or step.opcode != "get-tuple-element":
            return None
        source = self.instructions[computation].get(step.operands[0])
        index = re.search(r"index=(\d+)", step.attributes)
        return int(index[1]) if index and source and source.opcode == "parameter" else None

    def _constant(self, name: str, computation: str, loop: Instruction, outside: str) -> int | None:
        """An integer that is a constant of a loop's computation, or an element of its state that no trip changes."""
        step = self._source(name, computation)
        if step and step.opcode == "constant":
            return _integer(step)
        element = self._element(name, computation)
        (body,) = loop.called("body")
        result = next(step for step in self.computations[body] if step.root)
        if element is None or result.opcode != "tuple" or self._element(result.operands[element], body) != element:
            return None
        return self._initial(element, loop, outside)

    def _initial(self, element: int, loop: Instruction, computation: str) -> int | None:
        state = self._source(loop.operands[0], computation)
        value = self._source(state.operands[element], computation) if state and state.opcode == "tuple" else None
        return _integer(value) if value and value.opcode == "constant" else None


def parse_module(text: str) -> Module:
    """The module in `text`, as `compiled.as_text()` prints it; ValueError if it has no entry."""
    computations: dict[str, list[Instruction]] = {}
    entry = None
    for is_entry, name, body in COMPUTATION.findall(text):
        computations[name] = [step for line in body.splitlines() if (step := _instruction(line))]
        entry = name if is_entry else entry
    if entry is None:
        raise ValueError("the text holds no HLO module")
    return Module(computations, entry)


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"\s*(ROOT )?%(\S+) = ", line)
    if not head:
        return None
    rest = line[head.end() :]
    end = _balanced(rest) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    rest = rest[len(opcode) :]
    end = _balanced(rest)
    inside = rest[:end]
    operands = tuple(re.findall(r"%([^\s,()]+)", inside)) or ((inside[1:-1],) if opcode in ("constant", "parameter") else ())
    return Instruction(head[2], opcode, shape, operands, rest[end:], bool(head[1]))


def _balanced(text: str) -> int:
    """Where the parenthesis that opens `text` closes."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return place + 1
    return len(text)


def _integer(constant: Instruction) -> int | None:
    text = constant.operands[0] if constant.operands else ""
    return int(text) if re.fullmatch(r"-?\d+", text) else None


def _array(kind: str, dimensions: str, layout: str | None) -> tuple[int, int]:
    width = re.search(r"\d+", kind)
    bits = ELEMENT_BITS[kind] if kind in ELEMENT_BITS else int(width[0]) if width else 8
    size = 1
    for dimension in filter(None, dimensions.split(",")):
        size *= int(dimension)
    space = re.search(r"S\((\d+)\)", layout or "")
    return size * bits // 8, int(space[1]) if space else 0
