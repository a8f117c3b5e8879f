"""The command `mhc-jax plan`: a training step compiled for a machine that is not here, and what it needs, moves and takes, as figures.

`Plan` holds the figures of one residual kind; the table is made of them in `plan.table`. No figure here is measured.
"""

import importlib.util
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import jax

from mhc_jax.config import Config, override
from mhc_jax.errors import UserError
from mhc_jax.nn.count import ParameterCount, count_parameters
from mhc_jax.plan.collectives import KINDS
from mhc_jax.plan.compile import Memory, Program, compile_step
from mhc_jax.plan.cost import ACCELERATORS
from mhc_jax.plan.flops import training_flops
from mhc_jax.plan.model import StepTime, model_step
from mhc_jax.plan.topologies import Machine, Topology, slices_of
from mhc_jax.plan.traffic import stream_traffic
from mhc_jax.train.memory import on_host
from pallas_kernels.static_cost import check_libtpu, parse_module
from pallas_kernels.static_cost.compile import GPUS

Say = Callable[[str], None]


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind, over a whole step of one device."""

    count: int
    bytes: float  # that the device receives
    seconds: float  # on the interconnect, modelled
    waited: float  # of these, what the step's time shows


@dataclass(frozen=True)
class Products:
    """FLOPs of a token, by what counts them."""

    formula: float  # model FLOPs, forward and backward: `plan.flops`
    xla: float  # XLA's own count, which takes the bodies of loops once and Pallas kernels as nothing
    products: float  # matrix products of the compiled module, loops multiplied; those in Pallas kernels left out
    recomputed: float  # of these, what repeats the forward pass in the backward pass


@dataclass(frozen=True)
class Plan:
    """One residual kind of a config on a machine. What needs the compiled program is None where the compiler refused it."""

    residual: str
    parameters: ParameterCount
    memory: Memory
    limit: int  # bytes of HBM that a device has
    compile_seconds: float
    products: Products | None
    step: StepTime | None
    step_seconds: float | None
    mfu: float | None  # share of the bfloat16 peak, by the formula's FLOPs
    smallest: str | None  # the smallest slice that it would fit, an estimate

    @property
    def fits(self) -> bool:
        """Whether the compiler found room for it."""
        return self.products is not None and self.memory.peak <= self.limit

    @property
    def collectives(self) -> dict[str, Traffic]:
        """By kind, those that occur."""
        found: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0, 0.0])
        for operation in self.step.operations if self.step else ():
            if operation.kind in KINDS:
                for i, value in enumerate((operation.times, operation.ici_bytes, operation.seconds, operation.waited)):
                    found[operation.kind][i] += value
        return {kind: Traffic(int(found[kind][0]), *found[kind][1:]) for kind in KINDS if kind in found}


def check(config: Config) -> None:
    """UserError for what a plan cannot be made for."""
    if on_host(config):
        raise UserError('a plan has no host: give tables that lie on the devices, --model.engram.tables.placement "device"')


def with_mesh(config: Config, devices: int, where: str) -> Config:
    """The config on all devices of a machine: `fsdp` takes those that the other axes leave, unless it is given.

    Raises:
      UserError: the mesh does not come out even, has more devices than the machine or leaves some idle, or does not divide the model.
    """
    sizes = {axis.name: getattr(config.mesh, axis.name) for axis in fields(config.mesh)}
    others = 1
    for name, size in sizes.items():
        others *= 1 if name == "fsdp" else size
    asked = " x ".join(f"mesh.{name}" for name, size in sizes.items() if size > 1) or "mesh"
    if sizes["fsdp"] == 1:
        if devices % others:
            raise UserError(f"{asked} is {others}, which does not divide the {devices} devices of {where}; change one of the two")
        sizes["fsdp"] = devices // others
    elif others * sizes["fsdp"] != devices:
        kind = "more" if others * sizes["fsdp"] > devices else "fewer"
        raise UserError(f"{asked} is {others * sizes['fsdp']} devices, {kind} than the {devices} of {where}; change one of the two")
    # What is evaluated on is no part of the step, and must not decide which meshes can be planned.
    return override(config, {**{f"mesh.{name}": size for name, size in sizes.items()}, "train.eval_sequences": devices})


def plan_tpu(config: Config, topology: Topology, kinds: Sequence[str], say: Say, keep: Path | None = None) -> list[Plan]:
    """Plans of the residual kinds of a config on a slice, one after the other.

    Raises:
      UserError: libtpu is missing, or the mesh does not fit the slice, the model or the batch.
      RuntimeError: the compiler failed, but for want of memory.
    """
    check(config)
    try:
        check_libtpu()
    except ValueError as error:
        raise UserError(str(error)) from error
    configs = [with_mesh(override(config, {"model.residual": kind}), topology.devices, topology.name) for kind in kinds]
    return [_plan(own, topology, say, keep / own.model.residual if keep else None) for own in configs]


def _plan(config: Config, topology: Topology, say: Say, keep: Path | None) -> Plan:
    program = compile_step(config, topology.name, say, keep)
    if keep is not None:
        (keep / "module.txt").write_text(program.text)
    empty = Plan(
        residual=config.model.residual,
        parameters=count_parameters(config.model),
        memory=program.memory,
        limit=topology.hbm_bytes_per_device,
        compile_seconds=program.seconds,
        products=None,
        step=None,
        step_seconds=None,
        mfu=None,
        smallest=smallest(config, topology, program.memory),
    )
    if not program.text:
        return empty
    say(f"  compiled in {program.seconds:.0f} s; running the schedule")
    step = model_step(parse_module(program.text), program.listings or {}, topology, program.coordinates)
    products = count_products(config, program, step, topology.devices)
    tokens = config.tokens_per_step / topology.devices
    mfu = products.formula * tokens / (step.seconds * topology.kind.chip.flops_per_second)
    return replace(empty, products=products, step=step, step_seconds=step.seconds, mfu=mfu)


def plan_gpu(config: Config, name: str, devices: int, kinds: Sequence[str], say: Say) -> list[Plan]:
    """The same for GPUs of one machine: memory from the compiler, FLOPs from the formula, time from a roofline and nothing else.

    The roofline is the larger of the formula's FLOPs at the bfloat16 peak, and of the fewest bytes: parameters and optimizer read and
    written once, residual streams as one fused pass a sublayer moves them, over the memory's bandwidth. What devices exchange is not in it.

    Raises:
      UserError: the GPU is not known, the CUDA plugin is missing, or the mesh does not fit.
      RuntimeError: the compiler failed.
    """
    check(config)
    if name.upper() not in GPUS or name.upper() not in ACCELERATORS:
        raise UserError(f"there is no GPU {name!r}; the known ones are {', '.join(own for own in GPUS if own in ACCELERATORS)}")
    if not 1 <= devices <= 8:
        raise UserError(f"--devices is {devices}; plans are for one machine, which has 1 to 8")
    if importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
        raise UserError(
            f"planning for a GPU needs JAX's CUDA plugin, and no GPU: "
            f"pip install jax-cuda13-plugin=={jax.__version__} jax-cuda13-pjrt=={jax.__version__}"
        )
    chip, where = ACCELERATORS[name.upper()], f"{devices} {name.upper()}"
    plans = []
    for kind in kinds:
        own = with_mesh(override(config, {"model.residual": kind}), devices, where)
        program = compile_step(own, name.upper(), say)
        tokens = own.tokens_per_step / devices
        flops = training_flops(own, own.data.seq_len).total
        streams = 1 if kind == "residual" else own.model.connections.streams
        # Backward moves half as much again as forward (`pallas_kernels.mhc.cases`).
        moved = 2.5 * stream_traffic(streams)["plain" if kind == "residual" else "seam"] * own.model.dim * 2 * own.model.num_layers * 2
        seconds = max(flops * tokens / chip.flops_per_second, (2 * program.memory.arguments + moved * tokens) / chip.hbm_bytes_per_second)
        plans.append(
            Plan(
                residual=kind,
                parameters=count_parameters(own.model),
                memory=program.memory,
                limit=int(chip.hbm_bytes),
                compile_seconds=program.seconds,
                products=Products(flops, program.flops / tokens if program.flops else 0.0, 0.0, 0.0),
                step=None,
                step_seconds=seconds,
                mfu=flops * tokens / (seconds * chip.flops_per_second),
                smallest=None,
            )
        )
    return plans


def gpus(name: str, devices: int) -> Machine:
    """So many GPUs of a known name."""
    return Machine(f"{devices} {name.upper()}", f"NVIDIA {name.upper()}", devices, devices, int(ACCELERATORS[name.upper()].hbm_bytes))


def count_products(config: Config, program: Program, step: StepTime, devices: int) -> Products:
    """FLOPs of a token by formula and by the compiled module."""
    tokens = config.tokens_per_step / devices
    return Products(
        formula=training_flops(config, config.data.seq_len).total,
        xla=(program.flops or 0.0) / tokens,
        products=sum(operation.flops for operation in step.operations) / tokens,
        recomputed=sum(operation.flops for operation in step.operations if operation.recomputed) / tokens,
    )


def smallest(config: Config, topology: Topology, memory: Memory) -> str | None:
    """The smallest listed slice of a generation that the step would fit, were all that a device holds in proportion to its tokens."""
    for candidate in slices_of(topology.kind):
        scaled = memory.peak * topology.devices / candidate.devices
        if scaled <= candidate.hbm_bytes_per_device and config.train.batch_size // config.train.microbatches % candidate.devices == 0:
            return candidate.name
    return None
