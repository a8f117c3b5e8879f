"""What the scalar operations of a bundle listing compute: 32-bit integers, predicates and addresses, or None where it depends on data."""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pallas_kernels.static_cost.listing import Operation


@dataclass(frozen=True)
class Address:
    """A place relative to an allocation: "#allocation3", 1."""

    base: str
    offset: int


Value = int | bool | Address | None


def signed(value: int) -> int:
    """`value` as the hardware keeps it: 32 bits, two's complement."""
    return (value + 0x8000_0000) % 0x1_0000_0000 - 0x8000_0000


def unsigned(value: int) -> int:
    """The 32 bits of `value` read without a sign."""
    return value % 0x1_0000_0000


INTEGER: dict[str, Callable[[int, int], int]] = {
    "sadd.s32": operator.add,
    "ssub.s32": operator.sub,
    "smul.u32": lambda a, b: unsigned(a) * unsigned(b),
    "smul.s32": operator.mul,
    "smulhi.u32": lambda a, b: unsigned(a) * unsigned(b) >> 32,
    "sand.u32": operator.and_,
    "sor.u32": operator.or_,
    "sxor.u32": operator.xor,
    "sshll.u32": lambda a, b: unsigned(a) << (b & 63),
    "sshrl.u32": lambda a, b: unsigned(a) >> (b & 63),
    "sshra.s32": lambda a, b: a >> min(b, 31),
    "smin.u32": lambda a, b: min(unsigned(a), unsigned(b)),
    "smax.u32": lambda a, b: max(unsigned(a), unsigned(b)),
    "smin.s32": min,
    "smax.s32": max,
}

LOGICAL = ("por", "pand", "pnand", "pnor", "pxor", "pneg")

COMPARE: dict[str, Callable[[int, int], bool]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}


FROM_DATA = ("sld", "spop", "vpop", "inlined_call_operand", "sphi")


def is_known(name: str) -> bool:
    """Whether this module can compute the operation, or its result is data that no listing holds."""
    return (
        name in INTEGER
        or name in ("smov", "pmov", "scalar_select", "sdivrem.u32", *LOGICAL)
        or name.startswith(("int_to_ptr", "scalar_lea", "scmp.", *FROM_DATA))
        or name.endswith((".f32", ".bf16"))
    )


def compute(operation: Operation, values: Sequence[Value]) -> Value:
    """The result of one operation on the values of its operands; None if it is not known."""
    name = operation.name
    if name in ("smov", "pmov") or name.startswith("int_to_ptr"):
        return values[0]
    if name.startswith("scalar_lea"):
        base, offset = values[0], values[1]
        return Address(base.base, base.offset + offset) if isinstance(base, Address) and isinstance(offset, int) else None
    if name in LOGICAL:
        return _logical(name, values)
    if any(value is None or isinstance(value, Address) for value in values):
        return None
    numbers = [int(value) for value in values if value is not None and not isinstance(value, Address)]
    if name in INTEGER:
        return signed(INTEGER[name](*numbers))
    if name.startswith("scmp."):
        _, relation, kind, *_ = name.split(".")
        if kind == "u32":
            numbers = [unsigned(number) for number in numbers]
        return COMPARE[relation](*numbers) if kind in ("s32", "u32") else None
    if name == "sdivrem.u32" and numbers[1]:
        dividend, divisor = map(unsigned, numbers)
        return signed(dividend % divisor if "kRem" in operation.words else dividend // divisor)
    return None


def _logical(name: str, values: Sequence[Value]) -> bool | None:
    """Predicate logic over true, false and unknown."""
    if name == "pneg":
        return None if values[0] is None else not values[0]
    if name == "pxor":
        return None if None in values else bool(values[0]) != bool(values[1])
    decisive = name in ("por", "pnor")  # one such operand decides the result
    if any(value is not None and bool(value) == decisive for value in values):
        result = decisive
    elif None in values:
        return None
    else:
        result = not decisive
    return result != (name in ("pnand", "pnor"))
