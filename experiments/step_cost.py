"""What does each residual kind cost? Step time and memory of the variants of one config, their steps interleaved in one process.

A PyTorch process, if there is one, takes its steps in turn with them, so that neither runs while the other is timed.
Interleaving means that a machine whose speed drifts slows all variants alike, so the ratios hold where single times do not. No data is
read: token ids are random, which changes no cost but the experts' loads. So are the rows of Engram's tables, and since text repeats its
n-grams where random rows are nearly all different, a table's update costs more here than in training.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import NamedSharding

from mhc_jax.config import Config, override
from mhc_jax.engram_layout import table_primes
from mhc_jax.experiments.torch_process import TorchBaseline
from mhc_jax.nn.count import count_parameters
from mhc_jax.parallel.mesh import make_mesh
from mhc_jax.parallel.rules import Rules
from mhc_jax.train.fits import check_fits
from mhc_jax.train.step import compile_train_step, placed_initial_state

WARM_UP = 2  # steps of each variant that are not counted


@dataclass(frozen=True)
class StepCost:
    """Cost of one optimizer step of one residual kind."""

    kind: str  # residual kind, or "PyTorch"
    seconds: tuple[float, ...]  # of each measured step
    ratios: tuple[float, ...]  # of each measured step to the first kind's of the same round
    tokens: int  # of one step
    memory_bytes: int | None  # peak of one device by the compiler's count, where it tells
    connection_parameters: int
    parameters: int


def measure(config: Config, kinds: Sequence[str], rounds: int, torch: TorchBaseline | None = None) -> list[StepCost]:
    """Runs `rounds` steps of every kind, in turn, and of PyTorch last."""
    mesh, rules = make_mesh(config.mesh), Rules()
    with jax.set_mesh(mesh):
        batch = jax.device_put(random_batch(config), NamedSharding(mesh, rules.spec("batch", "sequence")))
        configs = [override(config, {"model.residual": kind}) for kind in kinds]
        for variant in configs:
            check_fits(variant, mesh)
        states, steps, peaks = [], [], []
        for variant in configs:
            states.append(placed_initial_state(variant, mesh, rules))
            step, peak = compile_train_step(variant, rules, states[-1], batch)
            steps.append(step)
            peaks.append(peak)
        seconds: list[list[float]] = [[] for _ in kinds]
        torch_seconds: list[float] = []
        for _ in range(WARM_UP + rounds):
            for index, step in enumerate(steps):
                start = time.perf_counter()
                states[index], metrics = step(states[index], batch)
                jax.block_until_ready(metrics)
                seconds[index].append(time.perf_counter() - start)
            if torch is not None:
                torch_seconds.append(torch.step())

    def cost(kind: str, times: list[float], memory: int | None, connection: int, parameters: int) -> StepCost:
        ratios = tuple(own / first for own, first in zip(times[WARM_UP:], seconds[0][WARM_UP:]))
        return StepCost(kind, tuple(times[WARM_UP:]), ratios, config.tokens_per_step, memory, connection, parameters)

    costs = []
    for kind, variant, times, peak in zip(kinds, configs, seconds, peaks):
        count = count_parameters(variant.model)
        costs.append(cost(kind, times, peak, count.connection, count.total))
    if torch is not None:
        costs.append(cost("PyTorch", torch_seconds, None, 0, torch.about["parameters"]))
    return costs


def random_batch(config: Config) -> dict[str, np.ndarray]:
    """A batch as training has them, int32, of one document a sequence; with Engram, each head's rows are drawn from its own table."""
    rng, shape = np.random.default_rng(0), (config.train.batch_size, config.data.seq_len)
    tokens = rng.integers(config.model.vocab_size, size=shape, dtype=np.int32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    batch = {"tokens": tokens, "targets": tokens, "positions": positions, "segment_ids": np.ones(shape, np.int32)}
    if config.model.engram is not None:
        sizes = table_primes(config.model.engram).reshape(len(config.model.engram.layers), -1)
        offsets = np.cumsum(sizes, axis=1) - sizes
        batch["engram_rows"] = (offsets + rng.integers(sizes, size=(*shape, *sizes.shape))).astype(np.int32)
    return batch


def table(costs: Sequence[StepCost]) -> str:
    """A Markdown table: medians over the measured steps, the fastest step, and the range of the ratios."""
    rows = [
        f"| residual | step, ms | fastest | tokens/s | time over `{costs[0].kind}` (range) | memory, MiB | parameters | of connections |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cost in costs:
        seconds = statistics.median(cost.seconds)
        ratio = f"{statistics.median(cost.ratios):.2f} ({min(cost.ratios):.2f} to {max(cost.ratios):.2f})"
        memory = "unknown" if cost.memory_bytes is None else f"{cost.memory_bytes / 2**20:,.0f}"
        rows.append(
            f"| {cost.kind} | {seconds * 1e3:.0f} | {min(cost.seconds) * 1e3:.0f} | {cost.tokens / seconds:,.0f} | {ratio} | {memory} "
            f"| {cost.parameters:,} | {cost.connection_parameters:,} |"
        )
    return "\n".join(rows)
