"""The two programs of a run: compiled once for every set of shapes they meet, timed, and weighed by the compiler."""

import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from mhc_jax.config import Config
from mhc_jax.parallel.rules import Rules
from mhc_jax.train.memory import on_host
from mhc_jax.train.step import TrainState, compile_train_step, eval_step

Program = Callable[..., Any]


class Programs:
    """Training step and evaluation. Only the rows that come from tables in host memory differ in number from batch to batch."""

    def __init__(self, config: Config, rules: Rules):
        self._config, self._rules = config, rules
        self._steps: dict[tuple[int, ...], Program] = {}
        self._evaluations: dict[tuple[int, ...], Program] = {}
        self.seconds = 0.0  # spent compiling
        self.memory_bytes: int | None = None  # the largest peak of a training step: arguments, outputs and temporaries of one device

    def train_step(self, state: TrainState, batch: Any, host: tuple[Any, ...] | None = None) -> Any:
        """One step, see `step.train_step`, or with `host` `step.train_step_with_host`; it takes over the memory of the state."""
        if (known := self._steps.get(_sizes(host))) is None:
            known = self.compile_step(state, batch, host)
        return known(state, batch) if host is None else known(state, batch, host)

    def eval_step(self, state: TrainState, batch: Any, host: tuple[Any, ...] | None = None) -> Any:
        """One evaluation, see `step.eval_step`."""
        if (known := self._evaluations.get(_sizes(host))) is None:
            known = self.compile_evaluation(state, batch, host)
        return known(*_evaluated(state), batch, host)

    def compile_step(self, state: TrainState, batch: Any, host: tuple[Any, ...] | None = None) -> Program:
        """Compiles the training step for arguments of these shapes."""
        started = time.perf_counter()
        step, peak = compile_train_step(self._config, self._rules, state, batch, host)
        self._steps[_sizes(host)] = step
        self.memory_bytes = max((size for size in (peak, self.memory_bytes) if size is not None), default=None)
        self.seconds += time.perf_counter() - started
        return step

    def compile_evaluation(self, state: TrainState, batch: Any, host: tuple[Any, ...] | None = None) -> Program:
        """Compiles the evaluation for arguments of these shapes."""
        started = time.perf_counter()
        everywhere = None if jax.sharding.get_abstract_mesh().empty else PartitionSpec()  # every process reads the whole result
        function = jax.jit(partial(eval_step, config=self._config, rules=self._rules), out_shardings=everywhere)
        self._evaluations[_sizes(host)] = program = function.lower(*_evaluated(state), batch, host).compile()
        self.seconds += time.perf_counter() - started
        return program


def compile_programs(config: Config, rules: Rules, state: TrainState, heldout: dict[str, jax.Array]) -> Programs:
    """Both programs, for training batches that lie as the held-out ones do.

    With tables in host memory they are compiled when the first batches come: how many rows those read is not known before.
    """
    programs = Programs(config, rules)
    if not on_host(config):
        sequences = config.train.batch_size
        batch = {name: jax.ShapeDtypeStruct((sequences, *x.shape[1:]), x.dtype, sharding=x.sharding) for name, x in heldout.items()}
        programs.compile_step(state, batch)
        programs.compile_evaluation(state, heldout)
    return programs


def evaluate(programs: Programs, state: TrainState, heldout: Iterable[Any]) -> tuple[float, dict[str, float], dict[str, np.ndarray]]:
    """Held-out loss, the scalars of metrics.jsonl and the stability arrays of the first held-out sequence.

    Args:
      heldout: the arguments of `Programs.eval_step` after the state, for each batch.
    """
    results = [programs.eval_step(state, *inputs) for inputs in heldout]
    loss = sum(float(part.loss) for part in results) / sum(int(part.targets) for part in results)
    arrays = {name: np.asarray(value) for name, value in results[0].stability._asdict().items()}
    scalars = {
        "loss": loss,
        "max_attention_logit": max(float(part.stability.max_attention_logit.max()) for part in results),
        "gain_forward": float(arrays["gain_forward_composite"].max()),
        "gain_backward": float(arrays["gain_backward_composite"].max()),
        "row_error": float(arrays["row_error"].max()),
        "column_error": float(arrays["column_error"].max()),
    }
    if results[0].indexer_loss is not None:
        scalars["indexer_loss"] = sum(float(part.indexer_loss) for part in results) / len(results)
    return loss, scalars, arrays


def _evaluated(state: TrainState) -> tuple[Any, ...]:
    return state.model, state.router_bias, state.memory


def _sizes(host: tuple[Any, ...] | None) -> tuple[int, ...]:
    return () if host is None else tuple(len(batch.cold) for batch in host)
