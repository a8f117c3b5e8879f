"""Configs with one to three fields set to something else, built in Python and read from JSON."""

import json
import math
import random
from pathlib import Path
from typing import Any

from mhc_jax.config import Config, fields, from_json, override, to_json, to_text
from mhc_jax.configs import get
from mhc_jax.engram_config import EngramConfig

from .harness import ACCEPTED, REFUSED, Check, Wrong
from .rules import problems

NAME, SHARE, SHORT = "config", 30, 60

WITH_ENGRAM = override(get("laptop"), {"model.engram": EngramConfig(layers=(1, 4), table_sizes=(1000, 3000))})
WITH_SPARSE = get("dsa_laptop")
NONSENSE: tuple[Any, ...] = (
    *(-1, 0, 1, 2, 3, 5, 7, 16, 10**12, 2**31 - 1, 2**31, 2**63, 10**400, -(10**18), True, False, None),
    *(math.nan, math.inf, -math.inf, 1e300, 1e-300, 3.3e38, 0.5, 1.0, -0.0, -0.5, 0.999, 2.5),
    *("", "x", "１２", "流", "\ud800", "a\0b", "..", "a/b", "12", "nan", "x" * 5000, "mhc", "none", "None", b"x", 1j),
    *((), (0.9, 0.8), (0.5, 0.5), (0.8, 0.9), (math.nan, 0.1), (0.1,), (0.1, 0.2, 0.3), (1, 1), (-0.5, 0.1), (0.3, -0.1), (1.5, 0.1)),
    *(("stdlib",), ("a", "b"), ("a", "a"), ("",), (3,), (None,), ("stdlib", "stdlib"), ((1.0,),), [], ["a"], {}, {"a": 1}, object()),
)
CHOICES = (
    "residual",
    "hc",
    "static_hc",
    "mhc",
    "identity_hc",
    "mhc_lite",
    "kromhc",
    "mean",
    "sum",
    "learned",
    "float32",
    "bfloat16",
    "none",
    "matmuls",
    "full",
    "warmup",
    "page",
)


def case(rng: random.Random, room: Path) -> tuple[str, Check]:
    base = rng.choice((get("laptop"), WITH_ENGRAM, WITH_SPARSE))
    values = dict(fields(base))
    through_json = rng.random() < 0.5
    changes = {path: draw(rng, values[path]) for path in rng.sample(sorted(values), rng.randint(1, 3))}
    if through_json:
        changes = {path: value for path, value in changes.items() if _is_json(value)}
        data = to_json(base)
        for path, value in changes.items():
            *groups, last = path.split(".")
            inner = data
            for group in groups:
                inner = inner[group]
            inner[last] = value
        written = json.dumps(data)
        changes = {path: tuple(value) if isinstance(value, list) else value for path, value in changes.items()}
    description = f"{'JSON' if through_json else 'override'} with {shorter(changes)}"
    expected = problems(values | changes)

    def check() -> str:
        try:
            config = from_json(json.loads(written)) if through_json else override(base, changes)
        except ValueError as error:
            return refused(error, expected)
        if expected:
            raise Wrong(f"accepted, but wrong are {', '.join(expected)}")
        for path, value in changes.items():
            if dict(fields(config))[path] != value:
                raise Wrong(f"{path} became {dict(fields(config))[path]!r}")
        round_trip(config)
        return ACCEPTED

    return description, check


def refused(error: ValueError, expected: list[str]) -> str:
    """A refusal that is justified and readable."""
    if type(error).__name__ != "UserError":
        raise error
    if not expected:
        raise Wrong(f"refused, but it is valid: {error}")
    if len(str(error)) > 1000 or not str(error).isprintable():
        raise Wrong(f"the message is too long or cannot be printed: {str(error)[:200]!r}")
    return REFUSED


def draw(rng: random.Random, now: Any) -> Any:
    """Another value for a field that holds `now`: anything at all, or something near."""
    kind = rng.random()
    if isinstance(now, tuple) and kind < 0.6:
        numbers, names = (-0.1, 0.0, 0.1, 0.5, 0.9, 1.0, 1.1, math.nan), ("a", "b", "", "stdlib")
        parts: tuple[Any, ...] = numbers
        if now:
            parts = {str: names, int: (-1, 0, 1, 2, 3, 4, 7, 1000, 2**31 - 1)}.get(type(now[0]), numbers)
        return tuple(rng.choices(parts, k=rng.choice([1, 2, 2, 2, 3])))
    if kind < 0.5:
        value = rng.choice(NONSENSE)
        return [list(x) if isinstance(x, tuple) else x for x in value] if isinstance(value, list) else value
    if isinstance(now, str):
        return rng.choice(CHOICES)
    if type(now) is int:
        return rng.choice([now * 2, now + 1, now - 1, now // 2, -now, float(now), str(now), now * 3, rng.randint(1, 64)])
    if type(now) is float:
        return rng.choice([now * 2, now / 3, -now, now + 1, str(now), rng.random(), 10.0 ** rng.randint(-60, 60)])
    return rng.choice(NONSENSE)


def round_trip(config: Config) -> None:
    """An accepted config survives being saved."""
    if from_json(json.loads(json.dumps(to_json(config), allow_nan=False))) != config:
        raise Wrong("the config that was saved is not the one that is read back")
    to_text(config).encode()
    hash(config)


def shorter(changes: dict[str, Any]) -> str:
    return ", ".join(f"{path} = {_shown(value)}" for path, value in changes.items()) or "nothing changed"


def _shown(value: Any) -> str:
    if type(value) is int and abs(value) > 10**100:
        return "10**400"
    return ascii(value)[:60]


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
