"""The interface of a table's optimizer, and Adam that moves the touched rows alone. No weight decay, no learning-rate factor, no clipping.

An optimizer is made of pure functions, as optax's are, with two differences: its gradient is `RowGradients`, and `update` returns the table
itself, because an array of updates would be as large as the table. With table and state donated, an update is in place, and its temporaries
are of the size of the gradient.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from mhc_jax.parallel.rules import Rules
from mhc_jax.tables.gradients import RowGradients
from mhc_jax.tables.layout import table_axes

State = Any


class TableOptimizer(NamedTuple):
    """How one table learns. Under a mesh with several devices each updates the rows that it owns."""

    init: Callable[[Array], State]  # table -> state
    update: Callable[[RowGradients, State, Array, Array | float], tuple[Array, State]]  # gradients, state, table, rate -> table, state
    partition: Callable[[], State]  # () -> how the state is split: a PartitionSpec in the place of each of its arrays


class RowAdamState(NamedTuple):
    """Moments of the rows, those of untouched rows as their last touch left them."""

    updates: Int[Array, ""]  # int32, of the table
    first: Float[Array, "padded head_dim"]
    second: Float[Array, "padded head_dim"]


class RowSecondMomentState(NamedTuple):
    """One number a row."""

    second: Float[Array, " padded"]  # running mean of the squared gradient's mean over the row, over the touches; 0: never touched


def row_adam(*, beta1: float = 0.9, beta2: float = 0.95, eps: float = 1e-20, rules: Rules = Rules()) -> TableOptimizer:
    """Adam (arXiv 1412.6980) of the touched rows alone; 8 bytes of state for each element.

    The paper trains the table by Adam with five times the learning rate and without weight decay (arXiv 2601.07372, Table 5), and names
    neither betas nor what becomes of rows that a batch does not touch. Here they stay, and so do their moments. Bias is corrected by the
    number of updates of the table, for all rows alike, as other row-sparse Adams do: a row that is first touched late moves by
    (1 - beta1) / sqrt(1 - beta2) of the learning rate (0.45 with the defaults), not by all of it.
    """

    def init(table: Array) -> RowAdamState:
        return RowAdamState(jnp.zeros((), jnp.int32), jnp.zeros_like(table), jnp.zeros_like(table))

    def update(gradients: RowGradients, state: RowAdamState, table: Array, rate: Array) -> tuple[Array, RowAdamState]:
        rows, values = gradients
        updates = state.updates + 1
        first = beta1 * taken(state.first, rows) + (1 - beta1) * values
        second = beta2 * taken(state.second, rows) + (1 - beta2) * jnp.square(values)
        steps = updates.astype(jnp.float32)
        direction = _over_root(first / (1 - beta1**steps), second / (1 - beta2**steps), eps)
        table = table.at[rows].add(-rate * direction, mode="drop")
        return table, RowAdamState(updates, put(state.first, rows, first), put(state.second, rows, second))

    def partition() -> RowAdamState:
        rows = rules.spec("table_rows", None)
        return RowAdamState(PartitionSpec(), rows, rows)  # type: ignore[arg-type]

    return TableOptimizer(init, on_owners(update, partition, rules), partition)


def row_second_moment(*, beta2: float = 0.95, eps: float = 1e-20, rules: Rules = Rules()) -> TableOptimizer:
    """A gradient over the root of one second moment a row, Adam with beta1 = 0 and its second moment shared by the row; 4 bytes a row.

    The sparse embeddings of the modded-nanogpt project learn in this way. A row's moment is that of its touches alone, and its first touch
    sets the moment whole. That takes the place of the correction of bias, which would need the number of touches of each row: corrected by
    the number of updates of the table, a row that is first touched late would jump by 1 / sqrt(1 - beta2) of the learning rate.
    """

    def init(table: Array) -> RowSecondMomentState:
        return RowSecondMomentState(jnp.zeros(table.shape[0], jnp.float32))

    def update(gradients: RowGradients, state: RowSecondMomentState, table: Array, rate: Array) -> tuple[Array, RowSecondMomentState]:
        rows, values = gradients
        square, before = jnp.square(values).mean(axis=1), taken(state.second, rows)
        second = jnp.where(before > 0, beta2 * before + (1 - beta2) * square, square)
        direction = _over_root(values, second[:, None], eps)
        return table.at[rows].add(-rate * direction, mode="drop"), RowSecondMomentState(put(state.second, rows, second))

    def partition() -> RowSecondMomentState:
        return RowSecondMomentState(rules.spec("table_rows"))  # type: ignore[arg-type]

    return TableOptimizer(init, on_owners(update, partition, rules), partition)


def _over_root(x: Array, second: Array, eps: float) -> Array:
    """x / (sqrt(second) + eps); zero where the second moment is.

    A gradient below 1e-19 has a square that is zero in float32. Over a small eps alone it would be a step of many learning rates.
    """
    return jnp.where(second > 0, x / (jnp.sqrt(second) + eps), 0.0)


def on_owners(update: Callable[..., Any], partition: Callable[[], Any], rules: Rules) -> Callable[..., Any]:
    """An update of a block of rows run by each device on its own, row numbers counted from the block's first."""

    def updated(gradients: RowGradients, state: Any, table: Array, rate: Array | float) -> tuple[Array, Any]:
        axes = table_axes(rules)
        if not axes:
            return update(gradients, state, table, rate)

        def local(gradients: RowGradients, state: Any, table: Array, rate: Array) -> tuple[Array, Any]:
            # The number of no row, `padded`, stays outside the block.
            own = jax.lax.axis_index(axes) * table.shape[0]
            return update(gradients._replace(rows=gradients.rows - own), state, table, rate)

        rows, parts = PartitionSpec(axes), partition()
        # The check of what varies over devices is off, as in `mhc_jax.parallel.shards`.
        sharded = jax.shard_map(local, in_specs=(rows, parts, rows, PartitionSpec()), out_specs=(rows, parts), check_vma=False)
        return sharded(gradients, state, table, jnp.asarray(rate, jnp.float32))

    return updated


def taken(x: Array, rows: Array) -> Array:
    """The rows with these numbers; zero where there is none."""
    return x.at[rows].get(mode="fill", fill_value=0.0)


def put(x: Array, rows: Array, values: Array) -> Array:
    """`x` with these rows replaced; numbers of no row are passed over."""
    return x.at[rows].set(values, mode="drop")
