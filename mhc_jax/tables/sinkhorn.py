"""Momentum balanced by Sinkhorn's normalisations, as DeepSeek-V4.1's tables learn. It moves every row in every step.

The direction U = diag(r) X diag(c) is the momentum X scaled until rows and columns have length one, by turns. Given the column factors c,
a row's factor r is one over the length of the row times c, so c alone is carried from pass to pass: a pass reads the momentum once, in
blocks, and no temporary has the size of the table.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mhc_jax.parallel.rules import Rules
from mhc_jax.tables.gradients import RowGradients
from mhc_jax.tables.layout import table_axes
from mhc_jax.tables.optimizers import TableOptimizer, on_owners, put, taken

BLOCK_ROWS = 4096  # rows of a block of a pass


class SinkhornState(NamedTuple):
    """One momentum."""

    momentum: Float[Array, "padded head_dim"]


def sinkhorn_momentum(
    num_rows: int, *, beta: float = 0.95, passes: int = 11, tau: float = 1e-3, gamma: float = 0.18, rules: Rules = Rules()
) -> TableOptimizer:
    """Nesterov momentum with balanced rows and columns (technical report of DeepSeek-V4.1); 4 bytes of state for each element.

        M <- beta M + (1 - beta) G;  X = beta M + (1 - beta) G, without rows no longer than tau times the mean length of the table's rows
        U = X with rows (pass 1, 3, ...) and columns (pass 2, 4, ...) divided by their lengths;  W <- W - gamma rate sqrt(head_dim) U

    Args:
      num_rows: rows without padding; padding does not count in the mean length.
      passes: normalisations, an odd number, so that rows come last.

    Raises:
      ValueError: the number of passes is even.
    """
    if passes % 2 == 0:
        raise ValueError(f"passes is {passes}; it must be odd, so that the last pass is one over rows")

    def init(table: Array) -> SinkhornState:
        return SinkhornState(jnp.zeros_like(table))

    def update(gradients: RowGradients, state: SinkhornState, table: Array, rate: Array) -> tuple[Array, SinkhornState]:
        rows, values = gradients
        momentum = (beta * state.momentum).at[rows].add((1 - beta) * values, mode="drop")
        # X / beta differs from M in the touched rows alone, and its scale does not matter. Those rows stand in M until the table is moved.
        kept = taken(momentum, rows)
        x = put(momentum, rows, kept + (1 - beta) / beta * values)
        factors, least = _balanced(x, num_rows, passes, tau, table_axes(rules))
        table, moved = _moved(table, x, factors, least, gamma * rate * table.shape[1] ** 0.5)
        # XLA orders by data alone. If the rows could be put back before the last pass, it would read from a copy of the momentum.
        after = jnp.where(moved >= 0, rows, table.shape[0])
        return table, SinkhornState(put(x, after, kept))

    def partition() -> SinkhornState:
        return SinkhornState(rules.spec("table_rows", None))  # type: ignore[arg-type]

    return TableOptimizer(init, on_owners(update, partition, rules), partition)


def _balanced(x: Array, num_rows: int, passes: int, tau: float, axes: tuple[str, ...]) -> tuple[Float[Array, " head_dim"], Array]:
    """Column factors, and the length that a row must exceed to count."""

    def summed(total: Array) -> Array:
        return jax.lax.psum(total, axes) if axes else total

    def add_lengths(start: Array, block: Array, fresh: Array, total: Array) -> Array:
        return total + jnp.where(fresh, _lengths(block), 0.0).sum()

    least = tau * summed(_over_blocks(x, add_lengths, jnp.zeros(()))) / num_rows

    def columns(_: Array, factors: Array) -> Array:
        def add_squares(start: Array, block: Array, fresh: Array, total: Array) -> Array:
            unit = _unit_rows(block, factors, least)
            return total + jnp.where(fresh[:, None], jnp.square(unit), 0.0).sum(axis=0)

        squares = summed(_over_blocks(x, add_squares, jnp.zeros(x.shape[1])))
        return jnp.where(squares > 0, factors / jnp.sqrt(squares), 0.0)

    return jax.lax.fori_loop(0, passes // 2, columns, jnp.ones(x.shape[1])), least


def _moved(table: Array, x: Array, factors: Array, least: Array, scale: Array) -> tuple[Array, Array]:
    """The table minus `scale` times the balanced direction, changed in place; and how many rows were moved."""

    def move(start: Array, block: Array, fresh: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        table, moved = carry
        direction = jnp.where(fresh[:, None], _unit_rows(block, factors, least), 0.0)
        before = jax.lax.dynamic_slice_in_dim(table, start, block.shape[0])
        table = jax.lax.dynamic_update_slice_in_dim(table, before - scale * direction, start, axis=0)
        return table, moved + (direction != 0).any(axis=1).sum(dtype=jnp.int32)

    return _over_blocks(x, move, (table, jnp.zeros((), jnp.int32)))


def _over_blocks(x: Array, step: Callable[[Array, Array, Bool[Array, " b"], Any], Any], carry: Any) -> Any:
    """The carry after `step(start, block, fresh, carry)` on each block of rows.

    The last block ends with the last row; `fresh` says which of its rows are not those of the block before.
    """
    size = min(BLOCK_ROWS, x.shape[0])

    def one(i: Array, carry: Any) -> Any:
        start = jnp.minimum(i * size, x.shape[0] - size)
        fresh = start + jnp.arange(size) >= i * size
        return step(start, jax.lax.dynamic_slice_in_dim(x, start, size), fresh, carry)

    return jax.lax.fori_loop(0, -(-x.shape[0] // size), one, carry)


def _lengths(rows: Float[Array, "b n"]) -> Float[Array, " b"]:
    """Euclidean lengths; the largest element is taken out, because squares of the momentum of rare rows would vanish in float32."""
    largest = jnp.abs(rows).max(axis=1)
    scaled = rows / jnp.where(largest > 0, largest, 1.0)[:, None]
    return largest * jnp.sqrt(jnp.square(scaled).sum(axis=1))


def _unit_rows(block: Float[Array, "b n"], factors: Float[Array, " n"], least: Array) -> Float[Array, "b n"]:
    """Rows times the column factors, with length one; zero where a row is no longer than `least`."""
    counted = _lengths(block) > least
    scaled = block * factors[None]
    length = _lengths(scaled)
    ok = counted & (length > 0)
    return jnp.where(ok[:, None], scaled / jnp.where(ok, length, 1.0)[:, None], 0.0)
