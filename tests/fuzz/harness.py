"""Runs cases and counts what became of them. What the cases are is the business of the kinds."""

import atexit
import random
import shutil
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from mhc_jax.errors import UserError

SECONDS = 60  # that one case may take before it counts as hanging

ACCEPTED, REFUSED = "accepted", "refused"

Check = Callable[[], str]  # returns ACCEPTED or REFUSED; raises UserError (refused) or anything else (wrong)


class Wrong(Exception):
    """Nonsense was accepted, something valid was refused, or a result is not what it must be."""


class Hangs(BaseException):
    """A case did not end; no handler of the code under test may catch it."""


class Kind(Protocol):
    """A module of cases; see docs/fuzzing.md."""

    NAME: str
    SHARE: int  # relative number of cases
    SHORT: int  # cases in the fast suite

    def case(self, rng: random.Random, room: Path) -> tuple[str, Check]:
        """A case, and in words what is wrong in it. `room` is an empty folder for its files."""


@dataclass
class Tally:
    """What became of the cases of one kind."""

    name: str
    accepted: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)  # with how to see each again

    @property
    def cases(self) -> int:
        return self.accepted + self.refused + len(self.wrong)


def run_kind(kind: Kind, numbers: range | list[int], seed: int) -> Tally:
    """Runs the cases with these numbers; a case depends on the seed, the kind and its number alone."""
    tally = Tally(kind.NAME)
    for number in numbers:
        room = Path(tempfile.mkdtemp(prefix="mhc-jax-fuzz-"))
        description, check = "(the generator itself)", None
        try:
            with _limited():
                description, check = kind.case(random.Random(f"{seed}/{kind.NAME}/{number}"), room)
                if check() == ACCEPTED:
                    tally.accepted += 1
                else:
                    tally.refused += 1
        except UserError as error:
            if check is not None and str(error).strip():
                tally.refused += 1
            else:
                tally.wrong.append(_report(kind, seed, number, description, error))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit and panics too: each is a bug that is being looked for
            tally.wrong.append(_report(kind, seed, number, description, error))
        finally:
            shutil.rmtree(room, ignore_errors=True)
    return tally


def run_all(kinds: list[Kind], cases: int, seed: int) -> list[Tally]:
    """About `cases` cases over all kinds, by their shares."""
    total = sum(kind.SHARE for kind in kinds)
    return [run_kind(kind, range(max(1, round(cases * kind.SHARE / total))), seed) for kind in kinds]


def table(tallies: list[Tally]) -> str:
    """A Markdown table of the counts."""
    rows = [[t.name, t.cases, t.accepted, t.refused, len(t.wrong)] for t in tallies]
    rows.append(["all", *(sum(row[i] for row in rows) for i in range(1, 5))])
    lines = ["| kind of case | cases | accepted | refused with a message | wrong |", "|---|---:|---:|---:|---:|"]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def _report(kind: Kind, seed: int, number: int, description: str, error: BaseException) -> str:
    if isinstance(error, Wrong):
        what = str(error)
    else:
        place = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {str(error)[:300]!s} ({place.filename}, line {place.lineno})"
    again = f"python -m tests.fuzz --seed {seed} --kind '{kind.NAME}' --case {number}"
    return f"{kind.NAME}, case {number}: {description}\n    {what}\n    {again}"


def lasting_folder() -> Path:
    """An empty folder that lives as long as this process, for what many cases start from."""
    folder = tempfile.mkdtemp(prefix="mhc-jax-fuzz-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@contextmanager
def _limited() -> Iterator[None]:
    def give_up(signum: int, frame: object) -> None:
        raise Hangs(f"not done after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
