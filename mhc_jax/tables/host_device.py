"""The device's part of a table in host memory: pure functions of the rows that came with the batch, and of those that stay here."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mhc_jax.parallel.rules import Rules
from mhc_jax.tables.gradients import RowGradients
from mhc_jax.tables.lookup import collect, lookup


class HostBatch(NamedTuple):
    """The rows that a batch reads from the host, each once, and where every token finds its own."""

    cold: Float[Any, "M head_dim"]  # float32; M is of few sizes, the last rows are zero and read by nothing
    index: Int[Any, "B *more"]  # int32: a hot row, or the number of hot rows plus a row of `cold`; past both: no row


class HotRows(NamedTuple):
    """The rows that stay on the device, a small table of their own."""

    table: Float[Any, "padded head_dim"]
    state: Any  # of its optimizer


def read_host(
    hot: HotRows | None, batch: HostBatch, *, hot_rows: int, rules: Rules = Rules(), capacity: float = 2.0
) -> tuple[Float[Array, "B *more head_dim"], Int[Array, ""]]:
    """What the tokens of a batch read, as `lookup` gives it, and how many rows took a further round of the exchange.

    The arrays of both arguments are split as tables and batches are. Without hot rows `hot` is not looked at.
    """
    cold, stats = lookup(batch.cold, batch.index - hot_rows, num_rows=batch.cold.shape[0], rules=rules, capacity=capacity)
    if not hot_rows:
        return cold, stats.overflow
    assert hot is not None
    warm, of_hot = lookup(hot.table, batch.index, num_rows=hot_rows, rules=rules, capacity=capacity)
    return jnp.where((batch.index < hot_rows)[..., None], warm, cold), stats.overflow + of_hot.overflow


def collect_host(
    batch: HostBatch, values: Float[Array, "B *more head_dim"], *, hot_rows: int, rules: Rules = Rules(), capacity: float = 2.0
) -> tuple[RowGradients | None, RowGradients]:
    """Gradients of the hot rows (None without any), for the device's optimizer, and those of `batch.cold`, for `HostTable.apply`."""
    cold, _ = collect(batch.index - hot_rows, values, num_rows=batch.cold.shape[0], rules=rules, capacity=capacity)
    if not hot_rows:
        return None, cold
    return collect(batch.index, values, num_rows=hot_rows, rules=rules, capacity=capacity)[0], cold
