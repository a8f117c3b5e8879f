"""Sweeps in plain Python: which fields of a config take which values, as small lists that combine, and the run list made of them.

A point is a dictionary of field changes, an axis a list of points. `field` makes an axis; `product`, `zipped` and `chain` combine axes,
and a list written by hand or by a comprehension does as well. Executing the list is runlist's part, reading it from a file sweep_files's.
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mhc_jax.config import Config, override
from mhc_jax.errors import UserError
from mhc_jax.experiments.runs import Run, RunList
from mhc_jax.typecheck import shown

Point = Mapping[str, Any]  # field path to value

SEED = "train.seed"
NOT_NAMED = (SEED, "name")  # fields that make no variant
LONGEST_NAME = 150  # characters of a run's name before its seed


def field(path: str, *values: Any) -> list[Point]:
    """The axis on which one field takes these values: `field("optimizer.learning_rate", 1e-3, 3e-3)`.

    Raises:
      UserError: there are no values.
    """
    if not values:
        raise UserError(f"field({path!r}) has no values; give at least one")
    return [{path: value} for value in values]


def product(*axes: Iterable[Point]) -> list[Point]:
    """Every combination of the axes' points; the first axis varies slowest.

    Raises:
      UserError: two axes change the same field.
    """
    return [_merged(points) for points in itertools.product(*axes)]


def zipped(*axes: Iterable[Point]) -> list[Point]:
    """The axes moved together: the first points of all, then the second ones.

    Raises:
      UserError: the axes are not equally long, or two of them change the same field.
    """
    listed = [list(axis) for axis in axes]
    if len({len(axis) for axis in listed}) > 1:
        raise UserError(f"zipped axes must be equally long; these have {', '.join(str(len(axis)) for axis in listed)} points")
    return [_merged(points) for points in zip(*listed, strict=True)]


def chain(*axes: Iterable[Point]) -> list[Point]:
    """The points of all axes, one axis after the other."""
    return list(itertools.chain(*axes))


def sweep(name: str, question: str, base: Config, points: Iterable[Point], *, baseline: Point | None = None) -> RunList:
    """The run list that trains `base` with the changes of each point, in the order of the points.

    Runs and variants are named by the fields that differ between runs: the residual kind by its value alone, all others as
    `learning_rate=0.001`. Runs that differ in `train.seed` alone are one variant.

    Args:
      name: of the list, and of its folder.
      question: what the list asks, for the report.
      base: the config that is changed.
      points: the changes, a dictionary a run.
      baseline: the values that pick the variant that the others are compared with, such as {"model.residual": "residual"}.

    Raises:
      UserError: a point changes a field that does not exist or makes a config that cannot be; two points make the same run; `baseline`
        picks no variant, or several.
    """
    points = list(points)
    configs = [_changed(base, point, number) for number, point in enumerate(points, start=1)]
    paths = list(dict.fromkeys(path for point in points for path in point if path not in NOT_NAMED))
    variants = labels(configs, paths)
    names = [f"{_short(variant, variants)}-seed{config.train.seed}" for variant, config in zip(variants, configs, strict=True)]
    seen: dict[str, int] = {}
    for number, run in enumerate(names, start=1):
        if run in seen:
            raise UserError(f"{name}: points {seen[run]} and {number} are the same run, {run}; drop one, or change a field or {SEED} of it")
        seen[run] = number
    runs = tuple(Run(*each) for each in zip(names, variants, configs, strict=True))
    return RunList(name, question, runs, _baseline(name, configs, variants, baseline))


def labels(configs: Sequence[Config], paths: Sequence[str]) -> list[str]:
    """What tells each config from the others, in words; equal where the fields at `paths` are, and `base` where those are equal in all."""
    parts: list[list[str]] = [[] for _ in configs]
    varying = [path for path in paths if any(value_at(c, path) != value_at(configs[0], path) for c in configs)]
    for path in sorted(varying, key=lambda path: path != "model.residual"):
        last = path.rpartition(".")[2]
        title = last if sum(other.rpartition(".")[2] == last for other in varying) == 1 else path
        values = [value_at(config, path) for config in configs]
        for part, text in zip(parts, _texts(values), strict=True):
            part.append(text if path == "model.residual" else f"{title}={text}")
    return [" ".join(part) or "base" for part in parts]


def value_at(config: Config, path: str) -> Any:
    """The field, or the group of fields, at a path; None below a group that the config does not have."""
    value: Any = config
    for part in path.split("."):
        value = getattr(value, part, None)
    return value


def _merged(points: Sequence[Point]) -> Point:
    merged: dict[str, Any] = {}
    for point in points:
        if both := merged.keys() & point.keys():
            raise UserError(f"two axes change {', '.join(sorted(both))}; each field may be changed by one of those that are combined")
        merged |= point
    return merged


def _changed(base: Config, point: Point, number: int) -> Config:
    if not isinstance(point, Mapping) or not all(isinstance(path, str) for path in point):
        raise UserError(f"point {number} of the sweep is {shown(point)}; a point is a dictionary from field paths to values")
    try:
        return override(base, point)
    except UserError as error:
        changes = ", ".join(f"{path} = {shown(value)}" for path, value in point.items())
        raise UserError(f"point {number} of the sweep ({changes}): {error}") from error


def _texts(values: Sequence[Any]) -> list[str]:
    """Short texts, different where the values are: plain numbers and words, or the number of the value in order of appearance."""
    texts = [_text(value) for value in values]
    distinct: list[Any] = []
    for value in values:
        if value not in distinct:
            distinct.append(value)
    if None not in texts and len(set(texts)) == len(distinct):
        return [text for text in texts if text is not None]
    return [str(distinct.index(value) + 1) for value in values]


def _text(value: Any) -> str | None:
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, tuple):
        parts = [_text(part) for part in value]
        return None if None in parts else ",".join(part for part in parts if part is not None)
    if value is None or isinstance(value, bool | int | str):
        text = str(value)
        return text if re.fullmatch(r"[A-Za-z0-9._-]{1,40}", text) else None
    return None


def _short(variant: str, variants: Sequence[str]) -> str:
    name = re.sub(r"[^A-Za-z0-9._=+-]", "_", variant)
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 10]}_{list(dict.fromkeys(variants)).index(variant) + 1}"


def _baseline(name: str, configs: Sequence[Config], variants: Sequence[str], wanted: Point | None) -> str | None:
    if wanted is None:
        return None
    found = dict.fromkeys(
        variant
        for variant, config in zip(variants, configs, strict=True)
        if all(value_at(config, path) == value for path, value in wanted.items())
    )
    if len(found) != 1:
        text = ", ".join(f"{path} = {shown(value)}" for path, value in wanted.items())
        which = f"several variants ({', '.join(found)}); add fields to it" if found else f"none of {', '.join(dict.fromkeys(variants))}"
        raise UserError(f"{name}: the baseline ({text}) picks {which}")
    return next(iter(found))
