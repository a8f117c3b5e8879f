"""Rows of a table by number, and the gradients of what was read: on one device here, on a mesh by `exchange`.

A number that names no row is never read in silence: its values are NaN, so that the loss says it, and it is counted.
"""

import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from mhc_jax.parallel.rules import Rules
from mhc_jax.parallel.shards import shard_count
from mhc_jax.tables import exchange
from mhc_jax.tables.exchange import LookupStats, valid
from mhc_jax.tables.gradients import RowGradients, distinct, sum_equal
from mhc_jax.tables.layout import padded_rows, table_axes, table_shards


def lookup(
    table: Float[Array, "padded head_dim"],
    rows: Int[Array, "B *more"],
    *,
    num_rows: int,
    rules: Rules = Rules(),
    capacity: float = 2.0,
) -> tuple[Float[Array, "B *more head_dim"], LookupStats]:
    """The rows with these numbers: values of the table's dtype, NaN for a number outside [0, num_rows).

    Under a mesh with several devices the table is split as `rules.table_rows` says and the numbers as batches are; each device asks the
    owners for its distinct rows. `capacity` sets how many rows a device sends to another in one round, as a multiple of an even share. What
    does not fit follows in further rounds, so that the result does not depend on it.

    Raises:
      ValueError: the table has not the rows that `num_rows` padded for this mesh come to, the numbers' first two axes, sequences and
        positions, do not divide by the devices that they are split over, or table and tokens are split differently.
    """
    axes, shards = table_axes(rules), table_shards(rules)
    where = _check(rows, num_rows, rules, shards, table)
    if axes:
        return exchange.lookup(table, rows, num_rows, where, axes, shards, capacity)
    numbers = valid(rows, num_rows, num_rows)
    return jnp.asarray(table).at[numbers].get(mode="fill", fill_value=jnp.nan), _local_stats(numbers, num_rows)


def collect(
    rows: Int[Array, "B *more"],
    values: Float[Array, "B *more head_dim"],
    *,
    num_rows: int,
    rules: Rules = Rules(),
    capacity: float = 2.0,
) -> tuple[RowGradients, LookupStats]:
    """The gradient of a table from the gradients of what was read from it: sums over equal numbers, in float32.

    Arguments are as in `lookup`; gradients of several microbatches may be joined on the first axis. Gradients of numbers outside
    [0, num_rows) are dropped and counted. The result has room for every row that can have a gradient: M is the smaller of the number of
    `rows` and of the table's rows; on a mesh, in each shard, the smaller of all `rows` and of the shard's rows. It has the same bits on
    every run and for every `capacity`.

    Raises:
      ValueError: as `lookup`, or the values do not go with the numbers.
    """
    if values.shape[:-1] != rows.shape:
        raise ValueError(f"values are {list(values.shape)}, but rows are {list(rows.shape)}; values need these axes and one more")
    axes, shards = table_axes(rules), table_shards(rules)
    where = _check(rows, num_rows, rules, shards)
    if axes:
        return exchange.collect(rows, values, num_rows, where, axes, shards, capacity)
    numbers = valid(rows, num_rows, num_rows).reshape(-1)
    found = distinct(numbers, num_rows)
    sums = sum_equal(found, values.reshape(rows.size, -1), num_rows)
    size = min(rows.size, num_rows)
    return RowGradients(found.rows[:size], sums[:size]), _local_stats(numbers, num_rows)


def _local_stats(numbers: Array, absent: int) -> LookupStats:
    zero = jnp.zeros((), jnp.int32)
    return LookupStats((numbers == absent).sum(dtype=jnp.int32), zero, zero)


def _check(rows: Array, num_rows: int, rules: Rules, shards: int, table: Array | None = None) -> PartitionSpec:
    """How the numbers are split."""
    if rows.ndim == 0 or rows.size == 0:
        raise ValueError(f"rows are {list(rows.shape)}; there must be at least one number")
    if not jnp.issubdtype(rows.dtype, jnp.integer):
        raise ValueError(f"rows are {rows.dtype}; they must be integers")
    axes = ("batch", "sequence")[: rows.ndim]
    for size, axis in zip(rows.shape, axes):
        if size % (parts := shard_count(rules, axis)):
            raise ValueError(f"rows are {list(rows.shape)}; the {axis} axis must divide by the {parts} devices that it is split over")
    wanted = padded_rows(num_rows, shards)
    if table is not None and table.shape[0] != wanted:
        raise ValueError(f"the table has {table.shape[0]} rows; {num_rows} rows in {shards} shards need {wanted}")
    return rules.spec(*axes)
