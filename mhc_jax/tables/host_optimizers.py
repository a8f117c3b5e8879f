"""Row-lazy optimizers in host memory: the mathematics of `optimizers` in NumPy, in place, on the rows of one gradient."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from mhc_jax.errors import UserError
from mhc_jax.parallel.rules import Rules
from mhc_jax.tables.optimizers import RowAdamState, RowSecondMomentState, TableOptimizer, row_adam, row_second_moment

State = Any  # the state of the device's optimizer, with NumPy arrays in it


class HostOptimizer(NamedTuple):
    """The same optimizer for rows in host memory and for those on the device. The arrays given to `update` are changed."""

    init: Callable[[np.ndarray], State]  # table [rows, head_dim] -> state
    begin: Callable[[State], None]  # once a step, before its updates
    update: Callable[[np.ndarray, np.ndarray, State, np.ndarray, float], None]  # distinct rows, values, state, table, rate
    device: TableOptimizer


def host_optimizer(name: str, *, beta1: float, beta2: float, eps: float, rules: Rules = Rules()) -> HostOptimizer:
    """`adam` or `row_second_moment` for a table in host memory.

    Raises:
      UserError: another optimizer, as `sinkhorn`: it moves every row in every step.
    """
    if name == "adam":
        return _adam(beta1, beta2, eps, rules)
    if name == "row_second_moment":
        return _second_moment(beta2, eps, rules)
    raise UserError(
        f"the optimizer {name} does not work for tables in host memory; adam and row_second_moment do, which move only the rows of a batch"
    )


def _adam(beta1: float, beta2: float, eps: float, rules: Rules) -> HostOptimizer:
    def init(table: np.ndarray) -> RowAdamState:
        return RowAdamState(np.zeros((), np.int32), np.zeros_like(table), np.zeros_like(table))  # type: ignore[arg-type]

    def begin(state: Any) -> None:
        state.updates[...] += 1

    def update(rows: np.ndarray, values: np.ndarray, state: Any, table: np.ndarray, rate: float) -> None:
        steps, b1, b2 = np.float32(state.updates), np.float32(beta1), np.float32(beta2)
        first = b1 * state.first[rows] + np.float32(1 - beta1) * values
        second = b2 * state.second[rows] + np.float32(1 - beta2) * np.square(values)
        state.first[rows], state.second[rows] = first, second
        table[rows] -= np.float32(rate) * _over_root(first / (1 - b1**steps), second / (1 - b2**steps), eps)

    return HostOptimizer(init, begin, update, row_adam(beta1=beta1, beta2=beta2, eps=eps, rules=rules))


def _second_moment(beta2: float, eps: float, rules: Rules) -> HostOptimizer:
    def init(table: np.ndarray) -> RowSecondMomentState:
        return RowSecondMomentState(np.zeros(len(table), np.float32))  # type: ignore[arg-type]

    def begin(state: Any) -> None:
        """Nothing is counted."""

    def update(rows: np.ndarray, values: np.ndarray, state: Any, table: np.ndarray, rate: float) -> None:
        square, before = np.square(values).mean(axis=1), state.second[rows]
        second = np.where(before > 0, np.float32(beta2) * before + np.float32(1 - beta2) * square, square)
        state.second[rows] = second
        table[rows] -= np.float32(rate) * _over_root(values, second[:, None], eps)

    return HostOptimizer(init, begin, update, row_second_moment(beta2=beta2, eps=eps, rules=rules))


def _over_root(x: np.ndarray, second: np.ndarray, eps: float) -> np.ndarray:
    """As that of the device: zero where the second moment is."""
    return np.where(second > 0, x / np.maximum(np.sqrt(second) + np.float32(eps), np.float32(1e-38)), np.float32(0))
