"""Command lines: unknown flags, values of the wrong type, words in the wrong place. Instead of training, what would begin is noted."""

import contextlib
import io
import math
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from mhc_jax.cli import main
from mhc_jax.config import Config, fields, to_json
from mhc_jax.configs import get
from mhc_jax.data import prepare as preparation
from mhc_jax.experiments import runlist, step_cost
from mhc_jax.experiments.runs import RunList, run_folder, save_runs
from mhc_jax.files import write_json
from mhc_jax.train import loop
from mhc_jax.train.folder import finished

from .config_fields import draw
from .harness import ACCEPTED, REFUSED, Check, Wrong
from .rules import FIELDS, problems
from .sweep_files import begun_must_be
from .sweep_files import case as sweep_case

NAME, SHARE, SHORT = "command line", 20, 25

KINDS = ("residual", "hc", "static_hc", "mhc", "identity_hc", "mhc_lite", "kromhc")
COMMANDS = ("train", "ablate", "bench", "data", "sweep")
WORDS = (
    *(
        "train",
        "ablate",
        "sweep",
        "report",
        "generate",
        "data",
        "bench",
        "laptop",
        "27b",
        "latpop",
        "LAPTOP",
        "",
        " ",
        "-",
        "--",
        "---",
        "-h",
        "--help",
        "-x",
    ),
    *(
        "--version",
        "--steps",
        "--steps=3",
        "--steps=",
        "3",
        "-1",
        "1e3",
        "nan",
        "--seed",
        "--residual",
        "mhc",
        "--variants",
        "--seeds",
        "0",
    ),
    *("--only", "--launch", "slurm", "xpk", "mine.py", "--csv"),
    *("--rounds", "--out", "--profile", "--no-profile", "--model.dim", "--model.dmi", "--model", "--model.moe.top_k", "--config.model.dim"),
    *("--data.source", "流", "\udcff", "x" * 10_000, "--" + "y" * 10_000, "$(true)", "%s", "{}", "@file", "--=", "=", "--debug", "None"),
    *("--optimizer.decay-points", "0.8", "0.9", "--data.tokenizer", "--data.weights", "model:none", "--model.attention.q-rank"),
)


def case(rng: random.Random, room: Path) -> tuple[str, Check]:
    made = {"words": _words, "fields": _fields, "options": _options, "report": _report, "generate": _generate, "sweep": _sweep}
    words, expected = made[rng.choices(list(made), [3, 4, 3, 2, 2, 3])[0]](rng, room)
    return f"mhc-jax {' '.join(ascii(word)[1:-1][:80] or repr('') for word in words)}", lambda: _run(words, expected, room)


# What is known beforehand about a command line: the values that its fields must have when something begins, those of each run that must
# begin, or that it must be refused.
Expected = dict[str, Any] | list[dict[str, Any]] | str | None


def _words(rng: random.Random, room: Path) -> tuple[list[str], Expected]:
    words = rng.choices(WORDS, k=rng.randint(0, 6))
    if rng.random() < 0.7:
        words = [rng.choice(COMMANDS), *(["laptop"] if rng.random() < 0.8 else []), *words]
    return words, None


def _fields(rng: random.Random, room: Path) -> tuple[list[str], Expected]:
    values = dict(fields(get("laptop")))
    changes = {path: draw(rng, values[path]) for path in rng.sample(sorted(FIELDS), rng.randint(1, 3))}
    words = [rng.choice(COMMANDS[:4]), "laptop"]
    for path, value in changes.items():
        flag = "--" + path.replace("_", rng.choice("_-"))
        if type(value) is bool and type(values[path]) is bool:
            words.append(flag if value else "--no-".join(flag.rsplit("--", 1)) if "." not in flag else _negated(flag))
        elif isinstance(value, tuple | list):
            words += [flag, *map(_word, value)]
        else:
            words += [f"{flag}={_word(value)}"] if rng.random() < 0.3 else [flag, _word(value)]
    written = all(_is_plain(value, values[path]) for path, value in changes.items())
    return words, changes if written and not problems(values | changes) else None


def _negated(flag: str) -> str:
    head, _, last = flag.rpartition(".")
    return f"{head}.no-{last}"


def _is_plain(value: Any, now: Any) -> bool:
    """Whether the word for this value means it and nothing else: text may look like an option, an int may stand for a float."""
    if isinstance(value, tuple):
        return bool(value) and isinstance(now, tuple) and all(_is_plain(x, y) for x, y in zip(value, now * len(value)))
    if isinstance(value, str):
        return value.isalnum() and value.isascii() and value != "None"
    if type(value) is not type(now):
        return False
    return (isinstance(value, int) and abs(value) < 2**64) or (isinstance(value, float) and math.isfinite(value))


def _word(value: Any) -> str:
    if type(value) is int and abs(value) > 10**100:
        return "1" + "0" * 400
    return str(value).replace("\0", "").replace("\ud800", "\udc80")  # what the operating system can hand over


def _options(rng: random.Random, room: Path) -> tuple[list[str], Expected]:
    (room / "file").write_text("mine")
    (room / "text").mkdir()
    (room / "other").mkdir()
    (room / "other" / "config.json").write_bytes(rng.choice([b"{}", b"", b"\xff", b"[1]", b'{"name": 3}', b"[" * 50_000]))
    (room / "other" / "summary.json").write_bytes(rng.choice([b"{}", b"", b"[]"]))
    command = rng.choice(["train", "ablate", "bench", "ablate"])
    if rng.random() < 0.2:
        return [command, "laptop", "--out" if command != "bench" else "--data.source", f"{room}/\udcff"], "refused"
    wrong: list[tuple[list[str], bool]] = [
        (["--variants"], True),
        (["--variants", "residual", "mch"], True),
        (["--variants", "mhc", "mhc"], True),
        (["--variants", rng.choice(KINDS)], False),
        (["--variants", *rng.sample(KINDS, 3)], False),
        (["--steps", "3", "--steps", "4"], True),
        (["--steps", "3", "--train.steps", "4"], True),
        (["--train.eval-every", "50", "--train.eval_every", "100"], True),
    ]
    seeds = rng.choice(["0", "-1", "1", "2", "1000000000", "1.5", "x", ""])
    rounds = rng.choice(["0", "-1", "1", "2", "99999999999", "1.5", "x", ""])
    places = [("file", True), ("file/run", True), ("other", command != "bench"), ("text", False), ("new/deep/er", False), ("n" * 300, True)]
    place, refused = rng.choice(places)
    if command == "ablate":
        wrong += [(["--seeds", seeds], seeds not in "12" or not seeds)] * 4
    if command == "bench":
        wrong += [(["--rounds", rounds], rounds not in "12" or not rounds)] * 4
    else:
        wrong += [(["--out", str(room / place)], refused and (command == "train" or place != "other"))] * 3
        wrong += [(["--out", "ftp://x/y"], True)]
    if command == "train":
        wrong = [(words, bad) for words, bad in wrong if words[0] != "--variants"]
    words, bad = rng.choice(wrong)
    return [command, "laptop", *words], "refused" if bad else {}


def _report(rng: random.Random, room: Path) -> tuple[list[str], Expected]:
    place = rng.choice(["missing", "file", "empty", "garbage", "loop", "file/below"])
    (room / "file").write_bytes(rng.randbytes(20))
    (room / "empty").mkdir()
    (room / "garbage" / "runs").mkdir(parents=True)
    lists = [b"", b"[]", b"{}", b"null", b'{"runs": 3}', b'{"runs": [1]}', b"\xff\xfe", b"[" * 50_000, b'{"name": "a", "runs": []}']
    (room / "garbage" / "runlist.json").write_bytes(rng.choice([*lists, rng.randbytes(100)]))
    (room / "loop").symlink_to(room / "loop")
    return ["report", *rng.choice([[], ["--html"], [str(room)]]), str(room / place)], "refused"


def _generate(rng: random.Random, room: Path) -> tuple[list[str], Expected]:
    """Folders that hold no run, or only a config or a piece of one: nothing can be opened."""
    place = rng.choice(["missing", "file", "empty", "garbage", "config", "loop", "file/below"])
    (room / "file").write_bytes(rng.randbytes(20))
    (room / "empty").mkdir()
    (room / "garbage").mkdir()
    (room / "garbage" / "config.json").write_bytes(rng.choice([b"{}", b"", b"\xff", b"[1]", b'{"name": 3}', b"[" * 50_000]))
    (room / "config").mkdir()
    write_json(room / "config" / "config.json", to_json(get("laptop")))
    if rng.random() < 0.7:
        (room / "config" / "tokenizer.json").write_bytes(rng.choice([b"", b"{}", b"\xff", b"[]", rng.randbytes(100)]))
    (room / "loop").symlink_to(room / "loop")
    options = [
        *(["--prompt", "def "], ["--prompt", "", "x"], ["--prompt"], [], ["--prompt", "流"], ["--prompt", "x" * 10_000]),
        *(
            [*("--prompt", "x"), flag, value]
            for flag in ("--max-tokens", "--context", "--top-k", "--seed")
            for value in ("0", "-1", "1e3", "nan")
        ),
        *([*("--prompt", "x"), flag, value] for flag in ("--temperature", "--top-p") for value in ("0", "-1", "nan", "inf", "2", "")),
    ]
    return ["generate", *rng.choice([[], [str(room)]] if rng.random() < 0.1 else [[]]), str(room / place), *rng.choice(options)], "refused"


def _sweep(rng: random.Random, room: Path) -> tuple[list[str], Expected]:
    words, points = sweep_case(rng, room)
    return words, "refused" if points is None else points


def _run(words: list[str], expected: Expected, room: Path) -> str:
    begun: list[Config] = []
    out, err = io.StringIO(), io.StringIO()
    with _noted(begun, room), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(words)
        except SystemExit as stop:  # the parser's way to end
            status = stop.code
    said = out.getvalue() + err.getvalue()
    if "Traceback (most recent" in said:
        raise Wrong(f"shows a traceback: {said[-500:]}")
    if status == 2:
        if not said.strip():
            raise Wrong("refused without a message")
        if begun:
            raise Wrong("refused after something had begun")
        if isinstance(expected, dict | list):
            raise Wrong(f"refused, but it is valid: {said.strip()[-300:]}")
        return REFUSED
    if status != 0:
        raise Wrong(f"exit status {status!r}")
    if not said.strip() and not begun:
        raise Wrong("accepted, but nothing happened")
    if expected == "refused":
        raise Wrong("accepted")
    if isinstance(expected, list):
        jobs = "--launch" in words
        if (jobs and begun) or (not jobs and not begun_must_be(expected, [dict(fields(config)) for config in begun])):
            raise Wrong(f"{len(begun)} runs began, not the {len(expected)} of the file")
        expected = {}
    for config in begun:
        if wrong := problems(dict(fields(config))):
            raise Wrong(f"accepted, but wrong are {', '.join(wrong)}")
        for path, value in (expected or {}).items():
            if path != "model.residual" and dict(fields(config))[path] != value:
                raise Wrong(f"{path} became {dict(fields(config))[path]!r}")
    return ACCEPTED


@contextlib.contextmanager
def _noted(begun: list[Config], room: Path) -> Iterator[None]:
    """Instead of training, notes the config; folders are looked at and claimed as in earnest."""

    def train(config: Config, folder: Any, **_: Any) -> dict[str, Any]:
        if finished(config, folder) is None:
            write_json(folder / "config.json", {})
        begun.append(config)
        return {"loss": None, "unigram_entropy": 5.0}

    def run_list(runs: RunList, folder: Any, train: Any) -> None:
        for run in runs.runs:
            finished(run.config, run_folder(folder, run))
        save_runs(runs, folder)
        begun.extend(run.config for run in runs.runs)

    def run_some(runs: Any, folder: Any, train: Any, say: Any) -> None:
        begun.extend(run.config for run in runs)

    def measure(config: Config, kinds: Any, rounds: int) -> list[Any]:
        begun.append(config)
        return []

    def prepare(data: Any, vocab_size: int, progress: Any) -> Any:
        print("prepared")
        return mock.Mock(sources=[])

    here = os.getcwd()
    os.chdir(room)
    try:
        with (
            mock.patch.object(loop, "train", train),
            mock.patch.object(runlist, "run_list", run_list),
            mock.patch.object(runlist, "run_some", run_some),
            mock.patch.object(step_cost, "measure", measure),
            mock.patch.object(step_cost, "table", lambda costs: ""),
            mock.patch.object(preparation, "prepare", prepare),
            mock.patch("mhc_jax.cli.jax_setup.prepare_jax", lambda: None),
        ):
            yield
    finally:
        os.chdir(here)
