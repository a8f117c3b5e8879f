"""Damage to bytes and to JSON, as disks, editors and killed processes do it."""

import copy
import json
import math
import random
from pathlib import Path
from typing import Any

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 10**6, 2**31, 2**63, 10**30, -0.0, 0.5, -2.5, 1e-320, 1e300, math.nan, math.inf, -math.inf),
    *("", "x", "3", "流", "\ud800", "a\0b", "x" * 3000, "../..", [], {}, [1], ["x"], [[[[]]]], {"a": 1}),
)


def damage_file(rng: random.Random, path: Path) -> str:
    """Damages a file in place and says how."""
    content = path.read_bytes()
    how = rng.choice(["flip", "flip", "flip", "cut", "cut", "empty", "delete", "zeros", "garbage", "append", "repeat", "folder"])
    if how == "delete":
        path.unlink()
    elif how == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(damage(rng, content, how))
    return f"{path.name}: {how}"


def damage(rng: random.Random, content: bytes, how: str) -> bytes:
    """The content after one kind of damage."""
    data = bytearray(content)
    start, length = rng.randrange(len(data) + 1), rng.randint(1, 64)
    if how == "flip":
        for _ in range(min(rng.choice([1, 1, 2, 30]), len(data))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del data[start:]
    elif how == "empty":
        data.clear()
    elif how == "zeros":
        data[start : start + length] = bytes(len(data[start : start + length]))
    elif how == "garbage":
        data[:] = rng.randbytes(rng.choice([1, 10, 1000]))
    elif how == "append":
        data += rng.randbytes(length)
    elif how == "repeat":
        lines = bytes(data).splitlines(keepends=True)
        if lines:
            index = rng.randrange(len(lines))
            lines.insert(rng.randrange(len(lines) + 1), lines[index])
        data[:] = b"".join(lines)
    return bytes(data)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    found: list[tuple[Any, Any]] = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found.append((value, key))
        found += places(inner)
    return found


def damage_json(rng: random.Random, value: Any, changes: int = 1) -> tuple[Any, str]:
    """A copy with some of its values replaced, removed, added or moved, and what was done."""
    value, done = copy.deepcopy(value), []
    for _ in range(changes):
        found = places(value)
        if not found or rng.random() < 0.02:
            value = rng.choice(ODD)
            done.append(f"all = {ascii(value)[:30]}")
            continue
        container, key = rng.choice(found)
        how = rng.choice(["set", "set", "set", "remove", "near", "double", "swap"])
        done.append(f"{how} {ascii(key)[:40]}")
        if how == "set":
            container[key] = rng.choice(ODD)
            done[-1] += f" to {ascii(container[key])[:30]}"
        elif how == "remove":
            del container[key]
        elif how == "near":
            old = container[key]
            number = isinstance(old, int | float) and not isinstance(old, bool)
            container[key] = old * rng.choice([-1, 2, 0, 1.5]) + rng.choice([0, 1]) if number else str(old)
        elif how == "double" and isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
        elif how == "double":
            container[f"{key}2"] = copy.deepcopy(container[key])
        else:
            other, other_key = rng.choice(found)
            container[key] = copy.deepcopy(other[other_key])
    return value, "; ".join(done)


def write_odd_json(path: Path, value: Any) -> None:
    """JSON with NaN and lone surrogates where they are in the value."""
    path.write_text(json.dumps(value))
