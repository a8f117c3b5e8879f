"""The command `mhc-jax`: reads the command line, calls one function, prints a message instead of a traceback for what a user can put right.

mhc-jax train NAME    one run
mhc-jax ablate NAME   the residual variants of a config, and a report
mhc-jax study NAME    a question that no list of runs fits, such as one of cost, and a report
mhc-jax report DIR    draws a report of `ablate` again
mhc-jax generate RUN  continues a text with what a run has learnt
mhc-jax data NAME     tokenises a config's text once
mhc-jax bench NAME    step time and memory of the variants, side by side
mhc-jax ngrams        how fast the rows of Engram's tables are computed
mhc-jax recall [RUN]  what cheaper choices of keys lose against the exact one, for random indexers and for that of a run
mhc-jax plan NAME     memory, FLOPs, traffic and modelled time of a training step on a TPU slice that is not here
mhc-jax kernels       what the Pallas kernels cost on chips that are not here, modelled; measured where an accelerator is
"""

import dataclasses
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, TypeVar

import tyro

from mhc_jax import __version__
from mhc_jax import configs as named
from mhc_jax.config import Config
from mhc_jax.errors import Preempted, UserError
from mhc_jax.files import to_path
from mhc_jax.residual_kinds import KINDS
from mhc_jax.typecheck import shown

SHORTHANDS = {"--residual": "--model.residual", "--seed": "--train.seed", "--steps": "--train.steps"}

MOST_ROUNDS = 1_000_000
MOST_DECODED = 1_000_000  # tokens


@dataclass(frozen=True)
class Train:
    """Train one config."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    out: str | None = None  # run folder, here or gs://bucket/folder or s3://bucket/folder; default runs/NAME-RESIDUAL-seedSEED
    profile: bool = False  # write a trace of five steps to RUN/profile


@dataclass(frozen=True)
class Ablate:
    """Train the residual variants of a config, everything else equal, and write a report."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    out: str | None = None  # folder of the runs and the report, here or in an object store; default runs/NAME
    seeds: int = 1  # runs of each variant
    variants: tuple[str, ...] = ("residual", "hc", "mhc", "identity_hc")  # residual kinds


@dataclass(frozen=True)
class AblateList:
    """Train a named list of runs and write a report."""

    out: str | None = None  # folder of the runs and the report, here or in an object store; default runs/NAME


@dataclass(frozen=True)
class StudyOptions:
    """Answer a named question and write a report; the same command again goes on from what is there."""

    out: str | None = None  # folder of the report, here or in an object store; default runs/NAME


@dataclass(frozen=True)
class Recall:
    """Print what choices of keys in pages, or in bins, lose against the exact choice."""

    run: tyro.conf.Positional[str | None] = None  # folder of a run with sparse attention; default random numbers alone


@dataclass(frozen=True)
class Generate:
    """Continue texts with a trained run. Speeds are written to standard error."""

    run: tyro.conf.Positional[str]  # folder of the run, here or in an object store
    prompt: tuple[str, ...]  # one text or several; an empty one begins with the end-of-text token
    max_tokens: int | None = None  # drawn for each prompt; default 200, or as many as the context has room for
    temperature: float = 0.8  # of the softmax; 0: always the most likely token
    top_k: int = 0  # draw from the so many most likely tokens; 0: from all
    top_p: float = 1.0  # draw from the most likely tokens that together have this probability
    seed: int = 0  # of the draws
    context: int | None = None  # tokens of a prompt and its continuation that there is room for; default data.seq_len of the run


@dataclass(frozen=True)
class Data:
    """Tokenise a config's text once; runs then read the result."""

    config: Annotated[Config, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class Bench:
    """Measure step time and memory of the residual variants, their steps interleaved in one process; or, with --decode, of decoding."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    rounds: int = 10  # measured steps of each variant
    variants: tuple[str, ...] = ("residual", "hc", "mhc", "identity_hc")  # residual kinds
    decode: int | None = None  # measure instead one more token after so many, with dense and with sparse attention
    torch_python: Path | None = None  # python of an environment with torch and transformers, to run the same shape in PyTorch beside them


@dataclass(frozen=True)
class Kernels:
    """List kernel by chip: modelled time, HBM floor and the ratio, against the XLA path; on an accelerator the measured time.

    Modelled figures are read off the real TPU compiler (libtpu, in the extra `tpu`) and need no TPU. Exit status 1: a figure is not valid.
    """

    filters: tyro.conf.Positional[tuple[str, ...]] = ()  # words that FAMILY/KERNEL/DIRECTION/CASE must hold
    topology: tuple[
        str, ...
    ] = ()  # TPUs to model, such as v5e:2x2 v5p:2x2x1 v6e:2x2 tpu7x:2x2x1; default the accelerator here, else v6e:2x2
    json: Path | None = None  # write everything to this file, the single operations included


@dataclass(frozen=True)
class Plan:
    """Compile a config's training step for a TPU slice that is not here: memory, FLOPs, traffic, modelled time and utilisation.

    Needs the TPU compiler (libtpu, in the extra `tpu`) and no TPU. For GPUs: memory, FLOPs and a roofline. Nothing is measured; see
    docs/plan.md.
    """

    config: Annotated[Config, tyro.conf.arg(name="")]
    topology: str | None = None  # slice, such as v5p:4x4x8, v5e:4x4, v6e:16x16 or tpu7x:4x4x8
    residual: str | None = None  # residual kinds, with commas between them, a column each; default the config's
    gpu: str | None = None  # instead of a slice: h100 or h200
    devices: int = 8  # GPUs of one machine
    json: Path | None = None  # write everything to this file, the single operations included


@dataclass(frozen=True)
class Ngrams:
    """Measure how fast the rows of Engram's tables are computed, for its published sizes, on the cores of this machine."""

    threads: int = 2
    rounds: int = 30  # batches of 65536 tokens


@dataclass(frozen=True)
class Report:
    """Draw the report of a folder again from what its runs wrote."""

    folder: tyro.conf.Positional[str]


Options = TypeVar("Options")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status.

    0; 1 where `kernels` has a figure that is not valid; 2 after a message about what the user can put right; 130 Ctrl-C, 143 SIGTERM.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    try:
        _check_encoding(args)
        with _sigterm_raises():
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
        print("mhc-jax: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Where no run goes on that catches the signal itself, it ends the command as Ctrl-C does."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise Preempted("stopped by SIGTERM; the same command goes on from what is there")

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
    commands: dict[str, Callable[[list[str]], int | None]] = {
        "train": _train,
        "ablate": _ablate,
        "study": _study,
        "report": _report,
        "generate": _generate,
        "data": _data,
        "bench": _bench,
        "ngrams": _ngrams,
        "recall": _recall,
        "kernels": _kernels,
        "plan": _plan,
    }
    if args[0] not in commands:
        raise UserError(f"there is no command {args[0]!r}; the commands are {', '.join(commands)}")
    return commands[args[0]](args[1:]) or 0


def _with_config(kind: type[Options], command: str, args: list[str]) -> Options:
    """The options of a command whose first argument names a config; `--path.to.field VALUE` changes a field of it."""
    if not args or args[0].startswith("-"):
        raise UserError(f"name a config: mhc-jax {command} NAME, with NAME one of {', '.join(named.CONFIGS)}")
    default = kind(config=named.get(args[0]))  # type: ignore[call-arg]
    own = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    rest: list[str] = []
    given: set[str] = set()
    for arg in args[1:]:
        flag, equals, value = arg.partition("=")
        if flag.removeprefix("--") not in own:
            flag = SHORTHANDS.get(flag, flag)
        if flag.startswith("--"):
            name = flag.replace("_", "-")
            if name in given:
                raise UserError(f"{shown(flag)} is given twice; which of the two is meant?")
            given.add(name)
        rest.append(flag + equals + value)
    # A group that may be None has flags where the named config has the group.
    return tyro.cli(kind, prog=f"mhc-jax {command} {args[0]}", args=rest, default=default, config=(tyro.conf.AvoidSubcommands,))


def _train(args: list[str]) -> None:
    options = _with_config(Train, "train", args)
    _prepare_jax()
    import jax

    from mhc_jax.parallel.processes import joined
    from mhc_jax.train.loop import train

    config = options.config
    folder = to_path(options.out) if options.out else Path("runs") / f"{config.name}-{config.model.residual}-seed{config.train.seed}"
    with joined():
        summary = train(config, folder, profile=options.profile)
        if jax.process_index() == 0:
            loss = "not finite" if summary["loss"] is None else f"{summary['loss']:.4f}"
            print(f"{folder}: held-out loss {loss}, unigram entropy {summary['unigram_entropy']:.4f}")


def _ablate(args: list[str]) -> None:
    runs, out = _run_list(args)
    _prepare_jax()
    import jax

    from mhc_jax.experiments.memory_study import studied
    from mhc_jax.experiments.runlist import follow, run_list
    from mhc_jax.parallel.processes import joined
    from mhc_jax.train.loop import train

    folder = to_path(out) if out else Path("runs") / runs.name
    runs = dataclasses.replace(runs, command=shlex.join(["mhc-jax", "ablate", *args]))
    with joined():
        (run_list if jax.process_index() == 0 else follow)(runs, folder, studied(train))


def _run_list(args: list[str]) -> tuple[Any, str | None]:
    """The list of runs that the arguments of `ablate` name, and the folder they give."""
    from mhc_jax.experiments.lists import RUN_LISTS

    if args and args[0] in RUN_LISTS:
        given = tyro.cli(AblateList, prog=f"mhc-jax ablate {args[0]}", args=args[1:])
        return RUN_LISTS[args[0]](), given.out
    from mhc_jax.experiments.ablation import ablation

    options = _with_config(Ablate, "ablate", args)
    _check_variants(options.variants)
    return ablation(options.config, kinds=options.variants, seeds=options.seeds), options.out


def _check_variants(variants: Sequence[str], flag: str = "--variants") -> None:
    if not variants:
        raise UserError(f"{flag} names no residual kind; choose from {', '.join(KINDS)}")
    for kind in variants:
        if kind not in KINDS:
            raise UserError(f"{flag}: there is no residual kind {kind!r}; choose from {', '.join(KINDS)}")
        if variants.count(kind) > 1:
            raise UserError(f"{flag} names {kind} twice")


def _study(args: list[str]) -> None:
    from mhc_jax.experiments.studies import STUDIES

    if not args or args[0] not in STUDIES:
        given = f"there is no study {shown(args[0])}" if args and not args[0].startswith("-") else "name a study: mhc-jax study NAME"
        raise UserError(f"{given}; the studies are {', '.join(STUDIES)}")
    name = args[0]
    options = tyro.cli(StudyOptions, prog=f"mhc-jax study {name}", args=args[1:])
    _prepare_jax()
    STUDIES[name](to_path(options.out) if options.out else Path("runs") / name, shlex.join(["mhc-jax", "study", *args]), print)


def _recall(args: list[str]) -> None:
    options = tyro.cli(Recall, prog="mhc-jax recall", args=args)
    _prepare_jax()
    from mhc_jax.experiments import selection_recall as study
    from mhc_jax.experiments.run_attention import recalls_of_run

    rows = list(recalls_of_run(to_path(options.run))) if options.run else study.random_recalls()
    print(*study.table(rows), sep="\n")


def _report(args: list[str]) -> None:
    options = tyro.cli(Report, prog="mhc-jax report", args=args)
    from mhc_jax.experiments.report import write_report

    write_report(to_path(options.folder))


def _generate(args: list[str]) -> None:
    options = tyro.cli(Generate, prog="mhc-jax generate", args=args)
    _prepare_jax()
    from mhc_jax.generate import Generator, Sampling

    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    generator = Generator.open(to_path(options.run))
    single = options.prompt if len(options.prompt) == 1 else ()

    def say(piece: str) -> None:
        print(piece, end="", flush=True)

    print(*single, end="", flush=True)
    done = generator.generate(
        options.prompt,
        options.max_tokens,
        sampling=sampling,
        seed=options.seed,
        context=options.context,
        say=say if single else None,
    )
    print(*([] if single else [f"{prompt}{text}\n" for prompt, text in zip(options.prompt, done.texts)]), sep="\n")
    print(done.speed, file=sys.stderr)


def _data(args: list[str]) -> None:
    options = _with_config(Data, "data", args)
    from mhc_jax.data.prepare import prepare

    prepared = prepare(options.config.data, options.config.model.vocab_size, progress=print)
    for source in prepared.sources:
        print(source.folder)


def _bench(args: list[str]) -> None:
    options = _with_config(Bench, "bench", args)
    _check_variants(options.variants)
    if not 1 <= options.rounds <= MOST_ROUNDS:
        raise UserError(f"--rounds is {options.rounds}; it must be 1 to {MOST_ROUNDS}")
    if options.decode is not None and not 1 <= options.decode <= MOST_DECODED:
        raise UserError(f"--decode is {options.decode}; it must be 1 to {MOST_DECODED}")
    _prepare_jax()
    if options.decode is not None:
        from mhc_jax.experiments import decode_speed

        print(decode_speed.table(decode_speed.measure(options.config, options.decode, options.rounds), options.decode))
        return
    from mhc_jax.experiments.step_cost import measure, table
    from mhc_jax.experiments.torch_process import torch_baseline

    if options.torch_python is None:
        print(table(measure(options.config, options.variants, options.rounds)))
        return
    with torch_baseline(options.torch_python, options.config) as torch:
        print("\n".join(f"{name}: {value}" for name, value in torch.about.items()))
        print(table(measure(options.config, options.variants, options.rounds, torch)))


def _ngrams(args: list[str]) -> None:
    options = tyro.cli(Ngrams, prog="mhc-jax ngrams", args=args)
    for flag, value, most in (("--threads", options.threads, 1024), ("--rounds", options.rounds, MOST_ROUNDS)):
        if not 1 <= value <= most:
            raise UserError(f"{flag} is {value}; it must be 1 to {most}")
    from mhc_jax.configs.engram import ENGRAM
    from mhc_jax.data.ngrams.speed import speed_table

    print(speed_table(ENGRAM, options.threads, options.rounds))


def _kernels(args: list[str]) -> int:
    options = tyro.cli(Kernels, prog="mhc-jax kernels", args=args)
    from mhc_jax.kernels import run_kernels

    return run_kernels(options.filters, options.topology, options.json, print)


def _plan(args: list[str]) -> None:
    options = _with_config(Plan, "plan", args)
    kinds = [options.config.model.residual] if options.residual is None else options.residual.split(",")
    _check_variants(kinds, "--residual")
    from mhc_jax.plan.topologies import listing, parse

    if (options.topology is None) == (options.gpu is None):
        raise UserError(f"name a slice or --gpu: mhc-jax plan {args[0]} --topology NAME, with NAME one of\n{listing()}")
    topology = parse(options.topology) if options.topology is not None else None
    from mhc_jax.plan.plan import gpus, plan_gpu, plan_tpu
    from mhc_jax.plan.table import render, to_json

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if topology is not None:
        plans, machine = plan_tpu(options.config, topology, kinds, say), topology.machine
    else:
        assert options.gpu is not None
        plans, machine = plan_gpu(options.config, options.gpu, options.devices, kinds, say), gpus(options.gpu, options.devices)
    print(render(plans, options.config, machine))
    if options.json:
        options.json.write_text(json.dumps(to_json(plans, options.config, machine), indent=1))


def _prepare_jax() -> None:
    """Compiled programs are kept between runs, and on a CPU the memory of a step for the next."""
    import jax

    from mhc_jax.data.prepare import cache_root
    from mhc_jax.parallel.devices import prefer_cpu_without_tpu
    from mhc_jax.train.host_memory import keep_freed_memory

    prefer_cpu_without_tpu()
    keep_freed_memory()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_root() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


if __name__ == "__main__":
    sys.exit(main())
