"""Which part of the network an operation of a compiled module belongs to, from the names that the program's scopes left in its metadata.

The scopes stand in `nn.decoder` and `train.step`. An operation that the compiler made without a name, such as a fusion or a copy, belongs
where most of what it fuses does, else where its operands come from.
"""

import re
from collections import Counter
from functools import cache

from pallas_kernels.static_cost.hlo import Instruction, Module

PARTS = {
    "attention": "attention",
    "experts": "experts",
    "feed_forward": "dense feed-forward",
    "connections": "residual connections",
    "engram": "Engram",
    "embedding": "embedding",
    "loss": "loss",
    "optimizer": "optimizer",
}
OTHER = "other"
COLLECTIVES = "collectives"
SCOPE = re.compile(rf"(?<![\w.])({'|'.join(PARTS)})(?![\w.])")
OP_NAME = re.compile(r'op_name="([^"]*)"')
LOOKED_BACK = 6  # operations, from one without a name


@cache
def op_name(step: Instruction) -> str:
    """What JAX called the operation that an instruction comes from; "" if the compiler did not keep it."""
    found = OP_NAME.search(step.attributes)
    return found[1] if found else ""


def is_recomputed(step: Instruction, module: Module) -> bool:
    """Whether it repeats in the backward pass what the forward pass did."""
    return any("rematted_computation" in name for name in (op_name(step), *_fused_names(step, module)[:1]))


def part_of(step: Instruction, computation: str, module: Module) -> str:
    """The part that an instruction belongs to, a value of PARTS or OTHER."""
    current: Instruction | None = step
    for _ in range(LOOKED_BACK):
        if current is None:
            break
        if found := _told(current, module):
            return found
        made = (module.instructions[computation].get(name) for name in current.operands)
        current = next((source for source in made if source and source.opcode not in ("constant", "parameter")), None)
    return OTHER


def _told(step: Instruction, module: Module) -> str | None:
    if step.name.startswith("ragged-dot"):  # the compiler's own kernel, which loses the name: only experts multiply so
        return PARTS["experts"]
    if found := SCOPE.findall(op_name(step)):
        return PARTS[found[-1]]
    counts = Counter(found[-1] for name in _fused_names(step, module) if (found := SCOPE.findall(name)))
    return PARTS[counts.most_common(1)[0][0]] if counts else None


def _fused_names(step: Instruction, module: Module) -> list[str]:
    if step.opcode not in ("fusion", "async-start", "call"):
        return []
    return [name for called in step.called("calls") for inner in module.computations.get(called, ()) if (name := op_name(inner))]
