"""The command `mhc-jax`: reads the command line, calls one function, prints a message instead of a traceback for what a user can put right.

mhc-jax train NAME    one run
mhc-jax ablate NAME   the residual variants of a config, and a report
mhc-jax report DIR    draws a report again
mhc-jax data NAME     tokenises a config's text once
mhc-jax bench NAME    step time and memory of the variants, side by side
"""

import dataclasses
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import tyro

from mhc_jax import __version__
from mhc_jax import configs as named
from mhc_jax.config import RESIDUAL_KINDS, Config
from mhc_jax.errors import UserError

SHORTHANDS = {"--residual": "--model.residual", "--seed": "--train.seed", "--steps": "--train.steps"}


@dataclass(frozen=True)
class Train:
    """Train one config."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    out: Path | None = None  # run folder; default runs/NAME-RESIDUAL-seedSEED
    profile: bool = False  # write a trace of five steps to RUN/profile


@dataclass(frozen=True)
class Ablate:
    """Train the residual variants of a config, everything else equal, and write a report."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    out: Path | None = None  # folder of the runs and the report; default runs/NAME
    seeds: int = 1  # runs of each variant
    variants: tuple[str, ...] = ("residual", "hc", "mhc", "identity_hc")  # residual kinds


@dataclass(frozen=True)
class Data:
    """Tokenise a config's text once; runs then read the result."""

    config: Annotated[Config, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class Bench:
    """Measure step time and memory of the residual variants, their steps interleaved in one process."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    rounds: int = 10  # measured steps of each variant
    variants: tuple[str, ...] = ("residual", "hc", "mhc", "identity_hc")  # residual kinds


@dataclass(frozen=True)
class Report:
    """Draw the report of a folder again from what its runs wrote."""

    folder: tyro.conf.Positional[Path]


Options = TypeVar("Options")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status: 0, or 2 after a message about something the user can put right."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    try:
        return _dispatch(args)
    except UserError as error:
        if debug:
            raise
        print(f"mhc-jax: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mhc-jax: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print(f"{__doc__}\nConfigs: {', '.join(named.CONFIGS)}. `mhc-jax train NAME --help` lists every field.")
        return 0 if args else 2
    if args[0] == "--version":
        print(__version__)
        return 0
    commands: dict[str, Callable[[list[str]], None]] = {
        "train": _train,
        "ablate": _ablate,
        "report": _report,
        "data": _data,
        "bench": _bench,
    }
    if args[0] not in commands:
        raise UserError(f"there is no command {args[0]!r}; the commands are {', '.join(commands)}")
    commands[args[0]](args[1:])
    return 0


def _with_config(kind: type[Options], command: str, args: list[str]) -> Options:
    """The options of a command whose first argument names a config; `--path.to.field VALUE` changes a field of it."""
    if not args or args[0].startswith("-"):
        raise UserError(f"name a config: mhc-jax {command} NAME, with NAME one of {', '.join(named.CONFIGS)}")
    default = kind(config=named.get(args[0]))  # type: ignore[call-arg]
    rest = []
    for arg in args[1:]:
        flag, equals, value = arg.partition("=")
        rest.append(SHORTHANDS.get(flag, flag) + equals + value)
    return tyro.cli(kind, prog=f"mhc-jax {command} {args[0]}", args=rest, default=default)


def _train(args: list[str]) -> None:
    options = _with_config(Train, "train", args)
    _prepare_jax()
    from mhc_jax.train.loop import train

    config = options.config
    folder = options.out or Path("runs") / f"{config.name}-{config.model.residual}-seed{config.train.seed}"
    summary = train(config, folder, profile=options.profile)
    print(f"{folder}: held-out loss {summary['loss']:.4f}, unigram entropy {summary['unigram_entropy']:.4f}")


def _ablate(args: list[str]) -> None:
    options = _with_config(Ablate, "ablate", args)
    for kind in options.variants:
        if kind not in RESIDUAL_KINDS:
            raise UserError(f"--variants: there is no residual kind {kind!r}; choose from {', '.join(RESIDUAL_KINDS)}")
    _prepare_jax()
    from mhc_jax.experiments.ablation import ablation
    from mhc_jax.experiments.runlist import run_list
    from mhc_jax.train.loop import train

    folder = options.out or Path("runs") / options.config.name
    runs = ablation(options.config, kinds=options.variants, seeds=options.seeds)
    run_list(dataclasses.replace(runs, command=shlex.join(["mhc-jax", "ablate", *args])), folder, train)


def _report(args: list[str]) -> None:
    options = tyro.cli(Report, prog="mhc-jax report", args=args)
    from mhc_jax.experiments.report import write_report

    write_report(options.folder)


def _data(args: list[str]) -> None:
    options = _with_config(Data, "data", args)
    from mhc_jax.data.prepare import prepare

    prepared = prepare(options.config.data, options.config.model.vocab_size, progress=print)
    print(prepared.folder)


def _bench(args: list[str]) -> None:
    options = _with_config(Bench, "bench", args)
    _prepare_jax()
    from mhc_jax.experiments.step_cost import measure, table

    print(table(measure(options.config, options.variants, options.rounds)))


def _prepare_jax() -> None:
    """Compiled programs are kept between runs, and on a CPU the memory of a step for the next."""
    import jax

    from mhc_jax.data.prepare import cache_root
    from mhc_jax.train.host_memory import keep_freed_memory

    keep_freed_memory()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_root() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


if __name__ == "__main__":
    sys.exit(main())
