"""Where a run's tables lie, as the loop sees it: on the devices, as a part of the state, or in host memory (docs/engram_host.md).

A table in host memory and the order of reading and updating it are `tables.host`'s. Here are the tables of all layers, between the loop's
steps: every step's row gradients are applied when the next batch has come, so that its rows are gathered while the step runs.
"""

import dataclasses
from collections.abc import Callable
from types import TracebackType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from mhc_jax.config import Config
from mhc_jax.engram_layout import table_rows
from mhc_jax.errors import UserError
from mhc_jax.mesh_config import MeshConfig
from mhc_jax.parallel.rows import own_rows, place_rows
from mhc_jax.parallel.rules import Rules
from mhc_jax.tables.host import HostTable
from mhc_jax.tables.host_device import HostBatch, HotRows
from mhc_jax.tables.host_optimizers import host_optimizer
from mhc_jax.tables.layout import initial_table
from mhc_jax.train.memory import Memory, initial_memory, memory_shardings, on_host, table_keys
from mhc_jax.train.step import StepMetrics, TrainState

Inputs = tuple[Any, ...]  # of a compiled program, after the state
ROWS = "engram_rows"  # of a batch


class DeviceTables:
    """Of a run whose tables, if it has any, are a part of its state: a batch is placed, and nothing else is to be done.

    A context manager, as `HostTables` is.
    """

    def __init__(self, config: Config, mesh: Mesh, rules: Rules):
        self._config, self._mesh, self._rules = config, mesh, rules
        self._of_batch = NamedSharding(mesh, rules.spec("batch", "sequence"))

    def own_rows(self, sequences: int) -> Int[np.ndarray, " own"]:
        """Which rows of a batch of so many sequences the devices of this process hold."""
        return own_rows(self._of_batch, sequences)

    def placed(self, batch: dict[str, np.ndarray], sequences: int) -> dict[str, Any]:
        """A batch of so many sequences on the devices, from its rows of this process."""
        return {name: place_rows(x, sequences, self._of_batch) for name, x in batch.items()}

    def like(self, state: TrainState) -> TrainState:
        """What a checkpoint is to be read like."""
        return state

    def start(self, state: TrainState, heldout: list[dict[str, Any]]) -> TrainState:
        """Begins with a state that was read or is the initial one; the state that is given to the compiled step."""
        return state

    def take(self, batch: dict[str, Any]) -> Inputs:
        """What the training step is given of a placed batch."""
        return (batch,)

    def step(self, program: Callable[..., Any], state: TrainState, inputs: Inputs) -> tuple[TrainState, StepMetrics]:
        """One training step; returns at once."""
        return program(state, *inputs)

    def evaluated(self, batch: dict[str, Any]) -> Inputs:
        """What an evaluation is given of a placed batch, with the tables as they are after all steps."""
        return (batch,)

    def saved(self, state: TrainState) -> TrainState:
        """The state with all tables after all steps, for a checkpoint: the same names and rows wherever they lie."""
        return state

    def close(self) -> None:
        """Gives up the tables and ends their threads; `start` may follow."""

    def __enter__(self) -> "DeviceTables":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class HostTables(DeviceTables):
    """Of a run with its tables in host memory. The state's memory is that of the hot rows, None without any.

    Raises:
      UserError: there are several processes, or JAX has no CPU device, which makes the first values.
    """

    def __init__(self, config: Config, mesh: Mesh, rules: Rules):
        super().__init__(config, mesh, rules)
        assert config.model.engram is not None
        self._layers, self._own = range(len(config.model.engram.layers)), config.model.engram.tables
        self._of_cold = NamedSharding(mesh, rules.spec("table_rows", None))
        self._tables: list[HostTable] = []
        self._pending: tuple[StepMetrics, Any] | None = None  # of the last step, while its gradients are not applied
        if jax.process_count() > 1:
            raise UserError(
                f'model.engram.tables.placement is "host", which needs a single process, but there are {jax.process_count()}; '
                'set it to "device"'
            )
        self._cpu = _cpu_mesh()

    def placed(self, batch: dict[str, np.ndarray], sequences: int) -> dict[str, Any]:
        """All but the rows' numbers is placed."""
        rest = super().placed({name: x for name, x in batch.items() if name != ROWS}, sequences)
        return rest | {ROWS: batch[ROWS]}

    def like(self, state: TrainState) -> TrainState:
        alone = dataclasses.replace(self._config, mesh=MeshConfig())  # no padding
        shapes = jax.eval_shape(lambda: initial_memory(alone))
        return state._replace(memory=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shapes))

    def start(self, state: TrainState, heldout: list[dict[str, Any]]) -> TrainState:
        """The rows that held-out batches read most are the hot ones: a choice that does not depend on where a run was cut."""
        own, optimizer = self._own, self._config.optimizer
        of_tables = host_optimizer(own.optimizer, beta1=optimizer.beta1, beta2=optimizer.beta2, eps=optimizer.eps, rules=self._rules)
        shards = self._mesh.size
        memory = state.memory
        for layer in self._layers:
            first = self._initial(layer) if memory is None else np.asarray(memory.tables[layer])
            self._tables.append(HostTable(_writable(first), of_tables, hot_rows=own.hot_rows, shards=shards))
            if memory is not None:
                self._tables[layer].state = jax.tree.map(_writable, memory.optimizer[layer])
        if not own.hot_rows:
            return state._replace(memory=None)
        hot = []
        for layer, table in enumerate(self._tables):
            for batch in heldout:
                table.count(batch[ROWS][:, :, layer])
            hot.append(table.choose_hot(table.hot()))
        where = memory_shardings(self._config, self._mesh, self._rules)
        on_devices = Memory(tuple(x.table for x in hot), tuple(x.state for x in hot))
        return state._replace(memory=jax.device_put(on_devices, where, may_alias=False))

    def take(self, batch: dict[str, Any]) -> Inputs:
        """Waits for the step before; meanwhile the rows of this batch are gathered."""
        handles = [table.prefetch(batch[ROWS][:, :, layer]) for layer, table in enumerate(self._tables)]
        self._apply()
        return self._inputs(batch, [table.take(handle) for table, handle in zip(self._tables, handles)])

    def step(self, program: Callable[..., Any], state: TrainState, inputs: Inputs) -> tuple[TrainState, StepMetrics]:
        state, metrics, gradients = program(state, *inputs)
        for array in jax.tree.leaves(gradients):
            array.copy_to_host_async()
        self._pending = metrics, gradients
        return state, metrics

    def evaluated(self, batch: dict[str, Any]) -> Inputs:
        self._apply()
        return self._inputs(batch, [table.read(batch[ROWS][:, :, layer]) for layer, table in enumerate(self._tables)])

    def saved(self, state: TrainState) -> TrainState:
        self._apply()
        if state.memory is not None:
            for table, *hot in zip(self._tables, state.memory.tables, state.memory.optimizer):
                table.settle(HotRows(*hot))
        tables: Any = tuple(x.table for x in self._tables)
        return state._replace(memory=Memory(tables, tuple(x.state for x in self._tables)))

    def close(self) -> None:
        for table in self._tables:
            table.close()
        self._tables, self._pending = [], None

    def _apply(self) -> None:
        """The last step's gradients, once they are there."""
        if self._pending is None:
            return
        (metrics, gradients), self._pending = self._pending, None
        rate = np.float32(metrics.learning_rate) * np.float32(self._own.learning_rate_factor)
        skipped = bool(metrics.skipped)
        for table, of_rows in zip(self._tables, gradients):
            table.apply(None if skipped else of_rows, float(rate))

    def _inputs(self, batch: dict[str, Any], read: list[HostBatch]) -> Inputs:
        host = tuple(HostBatch(jax.device_put(x.cold, self._of_cold), jax.device_put(x.index, self._of_batch)) for x in read)
        return {name: x for name, x in batch.items() if name != ROWS}, host

    def _initial(self, layer: int) -> np.ndarray:
        """The values that a table on the device begins with."""
        engram = self._config.model.engram
        assert engram is not None
        rows = table_rows(engram)[layer]
        with jax.set_mesh(self._cpu), jax.default_device(self._cpu.devices.item()):
            key = table_keys(self._config)[layer]
            make = jax.jit(
                lambda key: initial_table(key, rows, rows, engram.head_dim, engram.tables.init_std),
                out_shardings=NamedSharding(self._cpu, PartitionSpec()),
            )
            return np.asarray(make(key))


def open_tables(config: Config, mesh: Mesh, rules: Rules) -> DeviceTables:
    """What goes with the config; see the classes for what it raises."""
    return (HostTables if on_host(config) else DeviceTables)(config, mesh, rules)


def _cpu_mesh() -> Mesh:
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise UserError(
            "tables in host memory are made by JAX on the CPU, which JAX_PLATFORMS leaves out; add it, as in cuda,cpu"
        ) from error
    return Mesh(np.array([device]), ("host",))


def _writable(x: np.ndarray) -> np.ndarray:
    return x if x.flags.writeable else np.array(x)
