"""The command `mhc-jax`: reads the command line, calls one function, prints a message instead of a traceback for what a user can put right.

mhc-jax train NAME    one run
mhc-jax ablate NAME   the residual variants of a config, and a report
mhc-jax sweep FILE.py the runs of a sweep written in Python, here or as jobs of a cluster, and a report
mhc-jax study NAME    a question that no list of runs fits, such as one of cost, and a report
mhc-jax report DIR    how far the runs of `ablate` or `sweep` are, and their report drawn again
mhc-jax generate RUN  continues a text with what a run has learnt
mhc-jax data NAME     tokenises a config's text once
mhc-jax bench NAME    step time and memory of the variants, side by side
mhc-jax ngrams        how fast the rows of Engram's tables are computed
mhc-jax recall [RUN]  what cheaper choices of keys lose against the exact one, for random indexers and for that of a run
mhc-jax plan NAME     memory, FLOPs, traffic and modelled time of a training step on a TPU slice that is not here
mhc-jax kernels       what the Pallas kernels cost on chips that are not here, modelled; measured where an accelerator is
"""

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from mhc_jax import __version__
from mhc_jax import configs as named
from mhc_jax.cli import measuring, training
from mhc_jax.errors import Preempted, UserError
from mhc_jax.typecheck import shown

FROM_CHECKPOINT = "; the same command goes on from the last checkpoint"
FROM_WHAT_IS_THERE = "; the same command goes on from what is there"


@dataclass(frozen=True)
class Command:
    """A command of `mhc-jax`."""

    run: Callable[[list[str]], int | None]  # takes the arguments after its name; None is exit status 0
    again: str = ""  # what giving it again does after it was stopped; empty where nothing is kept


COMMANDS = {
    "train": Command(training.train, FROM_CHECKPOINT),
    "ablate": Command(training.ablate, FROM_CHECKPOINT),
    "sweep": Command(training.sweep, FROM_CHECKPOINT),
    "study": Command(training.study, FROM_WHAT_IS_THERE),
    "report": Command(training.report),
    "generate": Command(training.generate),
    "data": Command(training.data),
    "bench": Command(measuring.bench),
    "ngrams": Command(measuring.ngrams),
    "recall": Command(measuring.recall),
    "kernels": Command(measuring.kernels),
    "plan": Command(measuring.plan),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status.

    0; 1 where `kernels` has a figure that is not valid; 2 after a message about what the user can put right; 130 Ctrl-C, 143 SIGTERM.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    again = COMMANDS[args[0]].again if args and args[0] in COMMANDS else ""
    try:
        _check_encoding(args)
        with _sigterm_raises(again):
            return _dispatch(args)
    except UserError as error:
        if debug:
            raise
        print(f"mhc-jax: {error}", file=sys.stderr)
        return 2
    except Preempted as error:
        print(f"mhc-jax: {error}", file=sys.stderr)
        return 143
    except OSError as error:
        if debug or error.filename is None:  # without a file it is not about what the command line names
            raise
        print(f"mhc-jax: cannot use {error.filename}: {error.strerror}; check the path and its permissions", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"mhc-jax: interrupted{again}", file=sys.stderr)
        return 130


@contextmanager
def _sigterm_raises(again: str) -> Iterator[None]:
    """Where no run goes on that catches the signal itself, it ends the command as Ctrl-C does."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise Preempted(f"stopped by SIGTERM{again}")

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_encoding(args: list[str]) -> None:
    """Arguments end up in files of UTF-8 text: the config, the report."""
    for arg in args:
        try:
            arg.encode()
        except UnicodeEncodeError:
            raise UserError(f"the argument {shown(arg)} is not UTF-8; rename what it refers to") from None


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print(f"{__doc__}\nConfigs: {', '.join(named.CONFIGS)}. `mhc-jax train NAME --help` lists every field.")
        return 0 if args else 2
    if args[0] == "--version":
        print(__version__)
        return 0
    if args[0] not in COMMANDS:
        raise UserError(f"there is no command {args[0]!r}; the commands are {', '.join(COMMANDS)}")
    return COMMANDS[args[0]].run(args[1:]) or 0
