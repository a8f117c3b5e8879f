"""Whether a value fits the type of a config field. What a field's number may be beyond its type is config's part.

Dataclasses do not check types, and a saved config is JSON that anybody can edit: without this, a string in a field of numbers is found
hours later, or never.
"""

import dataclasses
import math
import types
from typing import Any, Literal, Union, get_args, get_origin

from mhc_jax.errors import UserError

LARGEST_INT = 2**31 - 1  # sizes and counters are 32-bit integers on the devices
LARGEST_FLOAT, SMALLEST_FLOAT = 3.4028234e38, 1.1754944e-38  # of float32, in which everything is computed; below, it would be 0


def check_types(config: Any, prefix: str = "") -> None:
    """Compares every field of a (nested) dataclass with its annotation.

    Understood are int, float (an int will do), bool, str, Literal, tuple, X | None and dataclasses.

    Raises:
      UserError: the first field that holds something else, a number that is not finite, or one that 32 bits cannot hold.
    """
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        group, optional = group_of(f.type)
        if group is not None:
            if optional and value is None:
                continue
            if not isinstance(value, group):
                kinds = f"a group of fields, {group.__name__}{', or None' if optional else ''}"
                raise UserError(f"{prefix}{f.name} is {shown(value)}; it must be {kinds}")
            check_types(value, f"{prefix}{f.name}.")
        elif wrong := _wrong(value, f.type):
            raise UserError(f"{prefix}{f.name} {wrong}")


def group_of(annotation: Any) -> tuple[type | None, bool]:
    """The dataclass that a field's annotation names, None where it names none; and whether the field may be None instead."""
    kinds = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    group = next((kind for kind in kinds if isinstance(kind, type) and dataclasses.is_dataclass(kind)), None)
    return group, type(None) in kinds


def shown(value: Any) -> str:
    """The value as a message shows it: never long, and always printable."""
    try:
        text = ascii(value)
    except ValueError:  # an integer of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _wrong(value: Any, kind: Any) -> str | None:
    """What is wrong with the value, as the predicate of a sentence; None where it fits."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        (inner,) = (arg for arg in args if arg is not type(None))
        return None if value is None else _wrong(value, inner)
    if origin is Literal:
        return None if type(value) is str and value in args else f"is {shown(value)}; it must be one of {', '.join(args)}"
    if origin is tuple:
        return _wrong_tuple(value, args)
    if kind is int:
        return _wrong_int(value)
    if kind is float:
        return _wrong_float(value)
    if kind is str:
        return _wrong_text(value)
    names = {bool: "true or false"}
    return None if type(value) is kind else f"is {shown(value)}; it must be {names[kind]}"


def _wrong_tuple(value: Any, args: tuple[Any, ...]) -> str | None:
    kinds = args
    if type(value) is not tuple:
        return f"is {shown(value)}; it must be a list of values given as a tuple"
    if args[-1] is Ellipsis:
        kinds = args[:1] * len(value)
    if len(value) != len(kinds):
        return f"has {len(value)} values; it must have {len(kinds)}"
    return next((f"holds a value that {wrong}" for item, kind in zip(value, kinds) if (wrong := _wrong(item, kind))), None)


def _wrong_int(value: Any) -> str | None:
    if type(value) is not int:
        return f"is {shown(value)}; it must be a whole number"
    return f"is {shown(value)}; whole numbers up to {LARGEST_INT} are supported" if abs(value) > LARGEST_INT else None


def _wrong_float(value: Any) -> str | None:
    if type(value) not in (int, float):
        return f"is {shown(value)}; it must be a number"
    if value != value:
        return "is not a number"
    if abs(value) > LARGEST_FLOAT:
        reason = "a finite number" if abs(value) == math.inf else "a finite number that float32 can hold"
        return f"is {shown(value)}; it must be {reason}"
    return f"is {value}, which is 0 in float32; it must be 0 or at least {SMALLEST_FLOAT}" if 0 < abs(value) < SMALLEST_FLOAT else None


def _wrong_text(value: Any) -> str | None:
    if type(value) is not str:
        return f"is {shown(value)}; it must be text"
    if "\0" in value:
        return f"is {shown(value)}; it must not hold a NUL character"
    try:
        value.encode()
    except UnicodeEncodeError:
        return f"is {shown(value)}, which is not UTF-8; rename what it refers to"
    return None
