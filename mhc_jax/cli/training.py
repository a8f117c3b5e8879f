"""Commands that make runs, or use what runs have left."""

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from mhc_jax.cli import jax_setup
from mhc_jax.cli.options import (
    Ablate,
    AblateList,
    Data,
    DataOfList,
    Generate,
    Report,
    StudyOptions,
    Sweep,
    Train,
    check_variants,
    with_config,
)
from mhc_jax.errors import UserError
from mhc_jax.files import to_path
from mhc_jax.typecheck import shown

if TYPE_CHECKING:
    from mhc_jax.experiments.runs import RunList


def train(args: list[str]) -> None:
    """One run of a config."""
    options = with_config(Train, "train", args)
    jax_setup.prepare_jax()
    import jax

    from mhc_jax.parallel.processes import joined
    from mhc_jax.train import loop

    config = options.config
    folder = to_path(options.out) if options.out else Path("runs") / f"{config.name}-{config.model.residual}-seed{config.train.seed}"
    with joined():
        summary = loop.train(config, folder, profile=options.profile)
        if jax.process_index() == 0:
            loss = "not finite" if summary["loss"] is None else f"{summary['loss']:.4f}"
            print(f"{folder}: held-out loss {loss}, unigram entropy {summary['unigram_entropy']:.4f}")


def ablate(args: list[str]) -> None:
    """A list of runs, and its report."""
    runs, out = _run_list(args)
    jax_setup.prepare_jax()
    import jax

    from mhc_jax.experiments.memory_study import studied
    from mhc_jax.experiments.runlist import follow, run_list
    from mhc_jax.parallel.processes import joined
    from mhc_jax.train import loop

    folder = to_path(out) if out else Path("runs") / runs.name
    runs = dataclasses.replace(runs, command=shlex.join(["mhc-jax", "ablate", *args]))
    with joined():
        (run_list if jax.process_index() == 0 else follow)(runs, folder, studied(loop.train))


def _run_list(args: list[str]) -> tuple["RunList", str | None]:
    """The list of runs that the arguments of `ablate` name, and the folder they give."""
    from mhc_jax.experiments.lists import RUN_LISTS

    if args and args[0] in RUN_LISTS:
        given = tyro.cli(AblateList, prog=f"mhc-jax ablate {args[0]}", args=args[1:])
        return RUN_LISTS[args[0]](), given.out
    from mhc_jax.experiments.ablation import ablation

    options = with_config(Ablate, "ablate", args)
    check_variants(options.variants)
    return ablation(options.config, kinds=options.variants, seeds=options.seeds), options.out


def sweep(args: list[str]) -> None:
    """The runs of a sweep here, or the job files for them."""
    options = tyro.cli(Sweep, prog="mhc-jax sweep", args=args)
    from mhc_jax.experiments.sweep_files import check_unchanged, chosen, open_list

    runs, folder = open_list(options.sweep, options.out)
    if not runs.command:
        runs = dataclasses.replace(runs, command=shlex.join(["mhc-jax", "sweep", *args]))
    some = runs.runs if options.only is None else chosen(runs, options.only)
    if options.launch is not None:
        from mhc_jax.experiments.launch import launch

        command = launch(options.launch, runs, some, folder)
        print(f"{len(some)} runs, none submitted yet; submit them:\n  {command}\nat any time, how far they are:\n  mhc-jax report {folder}")
        return
    if options.only is not None:
        check_unchanged(some, folder)
    jax_setup.prepare_jax()
    import jax

    from mhc_jax.experiments.memory_study import studied
    from mhc_jax.experiments.runlist import follow, run_list, run_some
    from mhc_jax.parallel.processes import joined
    from mhc_jax.train import loop

    with joined():
        first = jax.process_index() == 0
        if options.only is not None:
            run_some(some, folder, studied(loop.train), say=print if first else lambda line: None)
        else:
            (run_list if first else follow)(runs, folder, studied(loop.train))


def study(args: list[str]) -> None:
    """A question that no list of runs fits."""
    from mhc_jax.experiments.studies import SOURCES, STUDIES

    if not args or args[0] not in STUDIES:
        given = f"there is no study {shown(args[0])}" if args and not args[0].startswith("-") else "name a study: mhc-jax study NAME"
        raise UserError(f"{given}; the studies are {', '.join(STUDIES)}")
    name = args[0]
    options = tyro.cli(StudyOptions, prog=f"mhc-jax study {name}", args=args[1:])
    if options.source is not None and name not in SOURCES:
        raise UserError(f"--source: the study {name} reads no runs; leave it out")
    source = [to_path(options.source) if options.source is not None else Path("runs") / SOURCES[name]] if name in SOURCES else []
    jax_setup.prepare_jax()
    STUDIES[name](to_path(options.out) if options.out else Path("runs") / name, shlex.join(["mhc-jax", "study", *args]), print, *source)


def report(args: list[str]) -> None:
    """How far a list is, and its report drawn again."""
    options = tyro.cli(Report, prog="mhc-jax report", args=args)
    from mhc_jax.experiments import progress
    from mhc_jax.experiments.report import write_report
    from mhc_jax.experiments.runs import load_runs, save_runs
    from mhc_jax.experiments.sweep_files import LIST, open_list

    folder = to_path(options.sweep)
    if not (folder / LIST).exists():
        runs, folder = open_list(options.sweep)
        if not (folder / LIST).exists():
            save_runs(dataclasses.replace(runs, command=shlex.join(["mhc-jax", "sweep", options.sweep])), folder)
    runs = load_runs(folder)
    rows = progress.progress(runs, folder)
    print(progress.table(runs, rows), flush=True)
    if options.csv is not None:
        progress.write_csv(progress.columns(runs, rows), to_path(options.csv))
    if options.parquet is not None:
        progress.write_parquet(progress.columns(runs, rows), to_path(options.parquet))
    write_report(folder)


def generate(args: list[str]) -> None:
    """Texts continued by a run."""
    options = tyro.cli(Generate, prog="mhc-jax generate", args=args)
    jax_setup.prepare_jax()
    from mhc_jax.generate import Generator, Sampling

    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    generator = Generator.open(to_path(options.run), options.mesh)
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


def data(args: list[str]) -> None:
    """A config's text, or that of a list's runs, tokenised."""
    from mhc_jax.data.prepare import prepare
    from mhc_jax.experiments.sweep_files import names_list, open_list

    if args and names_list(args[0]):
        target = tyro.cli(DataOfList, prog="mhc-jax data", args=args).sweep
        wanted = dict.fromkeys((run.config.data, run.config.model.vocab_size) for run in open_list(target)[0].runs)
    else:
        config = with_config(Data, "data", args).config
        wanted = {(config.data, config.model.vocab_size): None}
    for config_data, vocab_size in wanted:
        for source in prepare(config_data, vocab_size, progress=print).sources:
            print(source.folder)
