"""A table larger than the device's memory: its rows lie in host memory, those that a batch reads travel with the batch.

Row numbers are known before a batch is used, so its rows are gathered in a thread while the step before it runs. What that step then
changes is read again: every batch sees the updates of all steps before it, as on the device. The rows that are read most may stay on the
device.

    table = HostTable(values, host_optimizer("adam", ...), hot_rows=65536)
    hot, ahead = table.hot(), table.prefetch(rows of step 0)
    for each step:
        batch = table.take(ahead)
        ...compiled: values, _ = read_host(hot, batch); of_hot, of_cold = collect_host(batch, gradient of values); hot's optimizer on of_hot
        ahead = table.prefetch(rows of the next step)
        table.apply(of_cold, rate)       # waits for the step
    table.settle(hot)

One process; the device's part is pure functions in `host_device`.
"""

import dataclasses
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from mhc_jax.errors import UserError
from mhc_jax.tables.gradients import RowGradients
from mhc_jax.tables.host_device import HostBatch, HotRows
from mhc_jax.tables.host_optimizers import HostOptimizer
from mhc_jax.tables.layout import padded_rows

LEAST_COLD = 256  # least room for the rows of a batch
ROWS_OF_A_THREAD = 4096  # fewer are not worth a thread


class Gathered(NamedTuple):
    """What a thread prepared: the batch, which rows it holds, and after how many updates reading began."""

    batch: HostBatch
    cold: np.ndarray  # int32, rising: the numbers of the rows in `batch.cold`, without its padding
    updates: int
    choice: int  # of the hot rows


@dataclasses.dataclass(frozen=True, eq=False)
class Handle:
    """Rows on their way."""

    rows: np.ndarray
    future: Future[Gathered]


class HostTable:
    """One table, its optimizer's state and the counted use of its rows. The thread that trains makes every call.

    Args:
      table: float32 [num_rows, head_dim], taken over and changed in place. It may be a memory map.
      optimizer: see `host_optimizers.host_optimizer`.
      hot_rows: how many rows stay on the device; at most all of them.
      shards: devices of the mesh that the rows of a batch are split over.
      threads: that copy and update rows.

    Raises:
      UserError: there are several processes, or more hot rows than rows.
      ValueError: the table is not float32 of two axes.
    """

    def __init__(self, table: np.ndarray, optimizer: HostOptimizer, *, hot_rows: int = 0, shards: int = 1, threads: int = 4):
        if jax.process_count() > 1:
            raise UserError(f"tables in host memory need a single process, but there are {jax.process_count()}; keep them on the devices")
        if table.ndim != 2 or table.dtype != np.float32:
            raise ValueError(f"the table is {table.dtype}{list(table.shape)}; it must be float32 [rows, head_dim]")
        if not 0 <= hot_rows <= len(table):
            raise UserError(f"hot_rows is {hot_rows}; the table has {len(table)} rows")
        self.table, self.state, self.optimizer = table, optimizer.init(table), optimizer
        self.uses = np.zeros(len(table), np.int64)  # how often a row was read
        self._shards, self._hot = shards, np.arange(hot_rows, dtype=np.int32)
        self._choice, self._updates = 0, 0
        self._log: list[tuple[int, np.ndarray]] = []  # updates (their number after them) and their rows, as far as a handle needs them
        self._open: list[Handle] = []
        self._taken: np.ndarray | None = None
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="table-ahead")
        self._workers, self._threads = ThreadPoolExecutor(threads, thread_name_prefix="table"), threads

    def prefetch(self, rows: np.ndarray) -> Handle:
        """Begins to gather the rows that a batch reads: int32 of any shape. Returns at once; the step before may still run."""
        handle = Handle(rows, self._ahead.submit(self._gather, rows))
        self._open.append(handle)
        return handle

    def take(self, handle: Handle) -> HostBatch:
        """The batch, as it is after all updates so far. Handles are taken in their order, and each is applied before the next is taken.

        Raises:
          RuntimeError: another order. The rows would miss an update.
        """
        if self._taken is not None:
            raise RuntimeError("a batch was taken whose gradients were not applied; call apply (with None for a skipped step) first")
        if not self._open or self._open[0] is not handle:
            raise RuntimeError("handles must be taken in the order of their prefetch, and once each")
        gathered = self._open.pop(0).future.result()
        if gathered.choice != self._choice:  # the hot rows are others now
            gathered = self._ahead.submit(self._gather, handle.rows, False).result()
        for number, rows in self._log:
            if number > gathered.updates:
                self._read_again(gathered, rows)
        # Later handles were gathered later still.
        self._log = [entry for entry in self._log if entry[0] > gathered.updates] if self._open else []
        self._taken = gathered.cold
        return gathered.batch

    def apply(self, gradients: RowGradients | None, rate: float) -> None:
        """Moves the rows of the batch that was taken, once the gradients are there. None: the step was skipped, nothing moves.

        Args:
          gradients: of `batch.cold`, as `host_device.collect_host` gives them.

        Raises:
          RuntimeError: no batch was taken.
        """
        if self._taken is None:
            raise RuntimeError("there is no batch whose gradients could be applied; call take first")
        cold, self._taken = self._taken, None
        if gradients is None:
            return
        places, values = np.asarray(gradients.rows), np.asarray(gradients.values)
        there = places < len(cold)
        rows, values = cold[places[there]], values[there]
        self.optimizer.begin(self.state)
        self._in_threads(len(rows), lambda part: self.optimizer.update(rows[part], values[part], self.state, self.table, rate))
        self._updates += 1
        if self._open:
            self._log.append((self._updates, rows))

    def read(self, rows: np.ndarray) -> HostBatch:
        """A batch that gets no gradients, for an evaluation: its rows as they are now, at once. Not counted."""
        return self._gather(rows, count=False).batch

    def count(self, rows: np.ndarray) -> None:
        """Counts rows as read, for `choose_hot`; numbers of no row are left out."""
        real = rows[(rows >= 0) & (rows < len(self.table))]
        np.add.at(self.uses, real, 1)

    def hot(self) -> HotRows:
        """The hot rows and their optimizer's state, as the host has them: arrays for the device, padded for its shards."""
        return HotRows(self._padded(self.table), jax.tree.map(lambda x: self._padded(x) if x.ndim else np.array(x), self.state))

    def settle(self, hot: HotRows) -> None:
        """Writes the device's hot rows and their state back, before the table is saved or other rows become hot."""
        for mine, theirs in zip((self.table, *jax.tree.leaves(self.state)), (hot.table, *jax.tree.leaves(hot.state))):
            if mine.ndim:
                mine[self._hot] = np.asarray(theirs)[: len(self._hot)]

    def choose_hot(self, hot: HotRows) -> HotRows:
        """The rows that were read most so far take the place of the hot ones, which are written back. Between apply and take.

        Raises:
          RuntimeError: a batch was taken whose gradients were not applied.
        """
        if self._taken is not None:
            raise RuntimeError("the hot rows cannot change between take and apply; call apply first")
        self.settle(hot)
        self._ahead.submit(lambda: None).result()  # nothing counts or reads any more
        count = len(self._hot)
        most = np.argpartition(-self.uses, count - 1)[:count] if count else self._hot
        self._hot = np.sort(most).astype(np.int32)
        self._choice += 1
        return self.hot()

    def close(self) -> None:
        """Ends the threads. What was not taken is given up."""
        self._ahead.shutdown(cancel_futures=True)
        self._workers.shutdown()

    def _gather(self, rows: np.ndarray, count: bool = True) -> Gathered:
        """In the thread. Rows that an update changes meanwhile may be torn; `take` reads them again."""
        updates, hot = self._updates, self._hot
        distinct, index, uses = np.unique(rows, return_inverse=True, return_counts=True)
        real = (distinct >= 0) & (distinct < len(self.table))
        if count:
            self.uses[distinct[real]] += uses[real]
        place = np.searchsorted(hot, distinct).astype(np.int32)
        is_hot = real & (hot[np.minimum(place, len(hot) - 1)] == distinct) if len(hot) else np.zeros(len(distinct), bool)
        is_cold = real & ~is_hot
        cold = distinct[is_cold].astype(np.int32)
        room = padded_rows(_room(len(cold)), self._shards)
        values = np.zeros((room, self.table.shape[1]), np.float32)
        self._in_threads(len(cold), lambda part: np.take(self.table, cold[part], axis=0, out=values[: len(cold)][part], mode="clip"))
        # First the hot rows, then the cold ones, then the number that names none.
        place[is_cold] = len(hot) + np.arange(len(cold), dtype=np.int32)
        place[~real] = len(hot) + room
        return Gathered(HostBatch(values, place[index].reshape(rows.shape)), cold, updates, self._choice)

    def _read_again(self, gathered: Gathered, rows: np.ndarray) -> None:
        changed = np.flatnonzero(np.isin(gathered.cold, rows, assume_unique=True))
        gathered.batch.cold[changed] = self.table[gathered.cold[changed]]

    def _padded(self, x: np.ndarray) -> np.ndarray:
        out = np.zeros((padded_rows(len(self._hot), self._shards), *x.shape[1:]), x.dtype)
        out[: len(self._hot)] = x[self._hot]
        return out

    def _in_threads(self, size: int, work: Any) -> None:
        """`work` on slices of range(size), which no two threads share."""
        part = max(-(-size // self._threads), ROWS_OF_A_THREAD)
        list(self._workers.map(work, [slice(start, start + part) for start in range(0, size, part)]))


def _room(rows: int) -> int:
    """A power of two, or one and a half, that holds so many rows: few sizes, since the step is compiled for each."""
    power = LEAST_COLD
    while power < rows:
        power *= 2
    return power * 3 // 4 if power > LEAST_COLD and rows <= power * 3 // 4 else power
