"""Commands that measure, count or model, and train nothing."""

import json
import sys

import tyro

from mhc_jax.cli import jax_setup
from mhc_jax.cli.options import Bench, Kernels, Ngrams, Plan, Recall, check_variants, with_config
from mhc_jax.errors import UserError
from mhc_jax.files import to_path

MOST_ROUNDS = 1_000_000
MOST_DECODED = 1_000_000  # tokens


def bench(args: list[str]) -> None:
    """Step time and memory, or the time of a token."""
    options = with_config(Bench, "bench", args)
    check_variants(options.variants)
    if not 1 <= options.rounds <= MOST_ROUNDS:
        raise UserError(f"--rounds is {options.rounds}; it must be 1 to {MOST_ROUNDS}")
    if options.decode is not None and not 1 <= options.decode <= MOST_DECODED:
        raise UserError(f"--decode is {options.decode}; it must be 1 to {MOST_DECODED}")
    jax_setup.prepare_jax()
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


def ngrams(args: list[str]) -> None:
    """How fast rows of tables are computed."""
    options = tyro.cli(Ngrams, prog="mhc-jax ngrams", args=args)
    for flag, value, most in (("--threads", options.threads, 1024), ("--rounds", options.rounds, MOST_ROUNDS)):
        if not 1 <= value <= most:
            raise UserError(f"{flag} is {value}; it must be 1 to {most}")
    from mhc_jax.configs.engram import ENGRAM
    from mhc_jax.data.ngrams.speed import speed_table

    print(speed_table(ENGRAM, options.threads, options.rounds))


def kernels(args: list[str]) -> int:
    """What the kernels cost; 1 where a figure is not valid."""
    options = tyro.cli(Kernels, prog="mhc-jax kernels", args=args)
    from mhc_jax.kernels import run_kernels

    return run_kernels(options.filters, options.topology, options.json, print)


def plan(args: list[str]) -> None:
    """A training step on a machine that is not here."""
    options = with_config(Plan, "plan", args)
    kinds = [options.config.model.residual] if options.residual is None else options.residual.split(",")
    check_variants(kinds, "--residual")
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


def recall(args: list[str]) -> None:
    """What cheaper choices of keys lose."""
    options = tyro.cli(Recall, prog="mhc-jax recall", args=args)
    jax_setup.prepare_jax()
    from mhc_jax.experiments import selection_recall as study
    from mhc_jax.experiments.run_attention import recalls_of_run

    rows = list(recalls_of_run(to_path(options.run))) if options.run else study.random_recalls()
    print(*study.table(rows), sep="\n")
