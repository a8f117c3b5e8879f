"""What the commands' arguments may be, and how they are read. What a command does with them is written in training and measuring."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import tyro

from mhc_jax import configs as named
from mhc_jax.config import Config
from mhc_jax.errors import UserError
from mhc_jax.mesh_config import MeshConfig
from mhc_jax.residual_kinds import KINDS
from mhc_jax.typecheck import shown

Options = TypeVar("Options")

SHORTHANDS = {"--residual": "--model.residual", "--seed": "--train.seed", "--steps": "--train.steps"}


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
class Sweep:
    """Train the runs of a sweep and write a report, or train some of them alone, or write the job files for a cluster (docs/sweeps.md)."""

    sweep: tyro.conf.Positional[str]  # FILE.py with a function sweep(), a named list, or the folder of a list
    out: str | None = None  # folder of the runs and the report, here or in an object store; default runs/NAME
    only: tuple[str, ...] | None = None  # names of runs, or their numbers from 1: train these, and write nothing but their folders
    launch: Literal["slurm", "xpk"] | None = None  # write job files, and print the command that submits them, instead of training here


@dataclass(frozen=True)
class StudyOptions:
    """Answer a named question and write a report; the same command again goes on from what is there."""

    out: str | None = None  # folder of the report, here or in an object store; default runs/NAME
    source: str | None = None  # folder of the run list that stability_at_depth reads; default runs/stability


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
    mesh: MeshConfig = field(default_factory=MeshConfig)  # devices that parameters and prompts are split over


@dataclass(frozen=True)
class Data:
    """Tokenise a config's text once; runs then read the result."""

    config: Annotated[Config, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class DataOfList:
    """Tokenise the texts of a list's runs once; runs then read the result."""

    sweep: tyro.conf.Positional[str]  # FILE.py with a function sweep(), a named list, or the folder of a list


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
    """Print how far every run of a list is, and draw its report again from what the runs wrote."""

    sweep: tyro.conf.Positional[str]  # folder of the list; or FILE.py or a named list, whose folder is runs/NAME
    csv: str | None = None  # write a row a run to this file
    parquet: str | None = None  # the same as Parquet (needs the extra `data`)


def with_config(kind: type[Options], command: str, args: list[str]) -> Options:
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


def check_variants(variants: Sequence[str], flag: str = "--variants") -> None:
    """Raises UserError unless `variants` are residual kinds, each named once; `flag` is what gave them."""
    if not variants:
        raise UserError(f"{flag} names no residual kind; choose from {', '.join(KINDS)}")
    for kind in variants:
        if kind not in KINDS:
            raise UserError(f"{flag}: there is no residual kind {kind!r}; choose from {', '.join(KINDS)}")
        if variants.count(kind) > 1:
            raise UserError(f"{flag} names {kind} twice")
