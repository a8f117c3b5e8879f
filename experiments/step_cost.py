"""What does each residual kind cost? Step time and memory of the variants of one config, their steps interleaved in one process.

Interleaving means that a machine whose speed drifts slows all variants alike, so the ratios hold where single times do not. No data is
read: token ids are random, which changes no cost but the experts' loads.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from mhc_jax.config import Config, override
from mhc_jax.nn.count import count_parameters
from mhc_jax.parallel.mesh import make_mesh
from mhc_jax.parallel.rules import Rules
from mhc_jax.train.step import compile_train_step, placed_initial_state

WARM_UP = 2  # steps of each variant that are not counted


@dataclass(frozen=True)
class StepCost:
    """Cost of one optimizer step of one residual kind."""

    kind: str
    seconds: tuple[float, ...]  # of each measured step
    ratios: tuple[float, ...]  # of each measured step to the first kind's of the same round
    tokens: int  # of one step
    memory_bytes: int | None  # peak of one device by the compiler's count, where it tells
    connection_parameters: int


def measure(config: Config, kinds: Sequence[str], rounds: int) -> list[StepCost]:
    """Runs `rounds` steps of every kind, in turn."""
    mesh, rules = make_mesh(config.mesh), Rules()
    shape = (config.train.batch_size, config.data.seq_len)
    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, rules.spec("batch", None))
        tokens = jax.random.randint(jax.random.key(0), shape, 0, config.model.vocab_size)
        positions = jnp.broadcast_to(jnp.arange(shape[1]), shape)
        batch = {"tokens": tokens, "targets": tokens, "positions": positions, "segment_ids": jnp.ones(shape, jnp.int32)}
        batch = jax.device_put(batch, place)
        configs = [override(config, {"model.residual": kind}) for kind in kinds]
        states, steps, peaks = [], [], []
        for variant in configs:
            states.append(placed_initial_state(variant, mesh, rules))
            step, peak = compile_train_step(variant, rules, states[-1], batch)
            steps.append(step)
            peaks.append(peak)
        seconds: list[list[float]] = [[] for _ in kinds]
        for _ in range(WARM_UP + rounds):
            for index, step in enumerate(steps):
                start = time.perf_counter()
                states[index], metrics = step(states[index], batch)
                jax.block_until_ready(metrics)
                seconds[index].append(time.perf_counter() - start)
    measured = [tuple(times[WARM_UP:]) for times in seconds]
    return [
        StepCost(
            kind=kind,
            seconds=times,
            ratios=tuple(own / first for own, first in zip(times, measured[0])),
            tokens=config.tokens_per_step,
            memory_bytes=peak,
            connection_parameters=count_parameters(variant.model).connection,
        )
        for kind, variant, times, peak in zip(kinds, configs, measured, peaks)
    ]


def table(costs: Sequence[StepCost]) -> str:
    """A Markdown table: medians over the measured steps, and the range of the ratios."""
    rows = [
        f"| residual | step, ms | tokens/s | step time over `{costs[0].kind}` (range) | peak memory, MiB | connection parameters |",
        "|---|---|---|---|---|---|",
    ]
    for cost in costs:
        seconds = statistics.median(cost.seconds)
        ratio = f"{statistics.median(cost.ratios):.2f} ({min(cost.ratios):.2f} to {max(cost.ratios):.2f})"
        memory = "unknown" if cost.memory_bytes is None else f"{cost.memory_bytes / 2**20:,.0f}"
        rows.append(
            f"| {cost.kind} | {seconds * 1e3:.0f} | {cost.tokens / seconds:,.0f} | {ratio} | {memory} | {cost.connection_parameters:,} |"
        )
    return "\n".join(rows)
