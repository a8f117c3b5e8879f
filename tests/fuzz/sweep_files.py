"""Sweep files: axes at random, valid or with something wrong in them, and words for `--only` and `--launch`.

What is known beforehand is counted here a second time, from the axes, and not by the code under test.
"""

import itertools
import json
import random
from pathlib import Path
from typing import Any

# Fields of `laptop` with values that its other fields allow, one with the next.
AXES: dict[str, tuple[Any, ...]] = {
    "model.residual": ("residual", "hc", "static_hc", "mhc", "identity_hc"),
    "train.seed": (0, 1, 2, 7),
    "optimizer.learning_rate": (1e-3, 1.5e-3, 3e-3),
    "train.steps": (300, 301, 400),
    "model.dense_dim": (128, 384),
    "data.heldout_share": (0.1, 0.25),
    "optimizer.decay_points": ((0.8, 0.9), (0.5, 0.9)),
    "data.source": (("a b/*.txt",), ("a b/*.txt", "流.jsonl")),
}
WRONG = (
    "def sweep(): return 3",
    "def sweep(): raise KeyError('x')",
    "def sweep(x): return x",
    "def sweep(): return sweep()",
    "sweep = 3",
    "from mhc_jax.experiments.sweeps import sweep",
    "raise SystemExit",
    "import sys; sys.exit('no')",
    "def sweep(:",
    "\0",
    "流 = 1",
    "x = " + "(" * 300,
    "raise KeyboardInterrupt_",
)
HEAD = "from mhc_jax.configs import get\nfrom mhc_jax.experiments import sweeps\n\n\ndef sweep():\n    "


def case(rng: random.Random, room: Path) -> tuple[list[str], list[dict[str, Any]] | None]:
    """A command line, and the field changes of the runs that must begin; None where it must be refused."""
    path = room / rng.choice(["mine.py", "a b.py", "流.py"])
    if rng.random() < 0.2:
        path.write_bytes(rng.choice([*(text.encode() for text in WRONG), b"\xff\xfe", rng.randbytes(50).replace(b"#", b"\xff")]))
        return ["sweep", str(path)], None
    axes = {name: rng.sample(AXES[name], rng.randint(1, 2)) for name in rng.sample(sorted(AXES), rng.randint(1, 3))}
    points = [dict(zip(axes, values)) for values in itertools.product(*axes.values())]
    name, baseline, good = "mine", "None", True
    match rng.choice(["none"] * 6 + ["collision", "twice", "field", "value", "baseline", "empty", "name"]):
        case "collision":
            points.append(dict(points[0]))
            good = False
        case "twice":
            first = next(iter(axes))
            line = f"points = sweeps.product(sweeps.field({first!r}, 1), sweeps.field({first!r}, 2))"
            path.write_text(f"{HEAD}{line}\n    return sweeps.sweep('mine', '?', get('laptop'), points)\n")
            return ["sweep", str(path)], None
        case "field":
            points.append({rng.choice(["model.dmi", "", ".", "model", "model.dim.x", "train.seed."]): 3})
            good = False
        case "value":
            points.append({rng.choice(["model.dim", "train.steps", "train.seed", "model.residual"]): rng.choice([None, -1, "x", [], 1.5])})
            good = False
        case "baseline":
            baseline, good = rng.choice(["{'model.residual': 'x'}", "{'model.dim': 1}", "{'no.such': 3}"]), False
        case "empty":
            points, good = [], False
        case "name":
            name = rng.choice(["a b", "流", "x" * 100])
    path.write_text(f"{HEAD}return sweeps.sweep({name!r}, '?', get('laptop'), {points!r}, baseline={baseline})\n")
    words = ["sweep", str(path)]
    if rng.random() < 0.4:
        numbers = rng.sample(range(1, len(points) + 1), min(len(points), rng.randint(1, 2)))
        if rng.random() < 0.3:
            numbers, good = [rng.choice([0, -1, len(points) + 1, 10**20])], False
        words += ["--only", *map(str, numbers)]
        points = [points[number - 1] for number in sorted(numbers)] if good else []
    if rng.random() < 0.2:
        words += ["--launch", "slurm"]
    return words, points if good else None


def begun_must_be(points: list[dict[str, Any]], values: list[dict[str, Any]]) -> bool:
    """Whether the runs that began, as field paths and values, are those of the points, in their order."""
    return len(points) == len(values) and all(
        json.dumps(own[path]) == json.dumps(wanted) for point, own in zip(points, values) for path, wanted in point.items()
    )
