"""Engram's tables in a training step: read before it, and moved by the gradients of what was read. The tables' own maths is in `tables`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray

from mhc_jax.config import Config
from mhc_jax.engram_layout import table_rows
from mhc_jax.parallel.rules import Rules
from mhc_jax.tables.gradients import RowGradients
from mhc_jax.tables.host_device import HostBatch, HotRows, collect_host, read_host
from mhc_jax.tables.layout import initial_table, padded_rows
from mhc_jax.tables.lookup import collect, lookup
from mhc_jax.tables.optimizers import TableOptimizer, row_adam, row_second_moment
from mhc_jax.tables.sinkhorn import sinkhorn_momentum

TABLE_KEY = 1  # folded into the run's seed: the network's parameters do not depend on whether there are tables


class Memory(NamedTuple):
    """The tables of a run, one for each layer that has one, and what their optimizers keep.

    With tables in host memory, a training state has one of the hot rows alone.
    """

    tables: tuple[Float[Array, "padded head_dim"], ...]
    optimizer: tuple[Any, ...]


def on_host(config: Config) -> bool:
    """Whether the run's tables lie in host memory."""
    return config.model.engram is not None and config.model.engram.tables.placement == "host"


def table_optimizer(config: Config, num_rows: int, rules: Rules) -> TableOptimizer:
    """The optimizer that `model.engram.tables` names, for a table of so many rows; Adam's with the betas of the network's."""
    assert config.model.engram is not None
    own = config.optimizer
    match config.model.engram.tables.optimizer:
        case "adam":
            return row_adam(beta1=own.beta1, beta2=own.beta2, eps=own.eps, rules=rules)
        case "row_second_moment":
            return row_second_moment(beta2=own.beta2, eps=own.eps, rules=rules)
        case "sinkhorn":
            return sinkhorn_momentum(num_rows, rules=rules)


def table_keys(config: Config) -> PRNGKeyArray:
    """The random key of each layer's table."""
    assert config.model.engram is not None
    return jax.random.split(jax.random.fold_in(jax.random.key(config.train.seed), TABLE_KEY), len(config.model.engram.layers))


def initial_memory(config: Config, rules: Rules = Rules()) -> Memory | None:
    """Whole tables of normal numbers from the config's seed, wherever the config places them; None without Engram."""
    engram = config.model.engram
    if engram is None:
        return None
    keys, shards, sizes = table_keys(config), config.mesh.devices, table_rows(engram)
    tables = tuple(
        initial_table(key, rows, padded_rows(rows, shards), engram.head_dim, engram.tables.init_std) for key, rows in zip(keys, sizes)
    )
    return Memory(tables, tuple(table_optimizer(config, rows, rules).init(table) for rows, table in zip(sizes, tables)))


def memory_shardings(config: Config, mesh: Mesh, rules: Rules) -> Memory | None:
    """A `Memory` with the sharding of each array: blocks of rows."""
    if config.model.engram is None:
        return None
    sizes = table_rows(config.model.engram)
    specs = Memory(
        (rules.spec("table_rows", None),) * len(sizes),  # type: ignore[arg-type]
        tuple(table_optimizer(config, rows, rules).partition() for rows in sizes),
    )
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, PartitionSpec))


def read(
    memory: Memory | None, rows: Int[Array, "B S layers H"] | None, config: Config, rules: Rules
) -> tuple[tuple[Float[Array, "B S d_mem"], ...], Int[Array, ""]]:
    """What the tokens of a batch read, in the streams' type; and how many rows took a further round of the exchange."""
    if memory is None:
        return (), jnp.zeros((), jnp.int32)
    engram = config.model.engram
    assert engram is not None and rows is not None
    values, overflow = [], jnp.zeros((), jnp.int32)
    for layer, (table, num_rows) in enumerate(zip(memory.tables, table_rows(engram))):
        found, stats = lookup(table, rows[:, :, layer], num_rows=num_rows, rules=rules, capacity=engram.tables.capacity)
        values.append(found.reshape(*found.shape[:2], -1).astype(config.model.dtype))
        overflow += stats.overflow
    return tuple(values), overflow


def gradients_of_rows(
    rows: Int[Array, "B S layers H"], values: tuple[Float[Array, "B S d_mem"], ...], config: Config, rules: Rules
) -> tuple[RowGradients, ...]:
    """The gradients of the tables from those of what was read."""
    engram = config.model.engram
    assert engram is not None
    collected = []
    for layer, (of_layer, num_rows) in enumerate(zip(values, table_rows(engram))):
        own = rows[:, :, layer]
        by_row = of_layer.reshape(*own.shape, engram.head_dim)
        collected.append(collect(own, by_row, num_rows=num_rows, rules=rules, capacity=engram.tables.capacity)[0])
    return tuple(collected)


def read_with_host(
    memory: Memory | None, host: tuple[HostBatch, ...], config: Config, rules: Rules
) -> tuple[tuple[Float[Array, "B S d_mem"], ...], Int[Array, ""]]:
    """As `read`, from the rows that came from the host and the hot ones in `memory`, None without any."""
    engram = config.model.engram
    assert engram is not None
    hot = [None] * len(host) if memory is None else [HotRows(*own) for own in zip(memory.tables, memory.optimizer)]
    values, overflow, tables = [], jnp.zeros((), jnp.int32), engram.tables
    for of_layer, batch in zip(hot, host):
        found, further = read_host(of_layer, batch, hot_rows=tables.hot_rows, rules=rules, capacity=tables.capacity)
        values.append(found.reshape(*found.shape[:2], -1).astype(config.model.dtype))
        overflow += further
    return tuple(values), overflow


def gradients_with_host(
    host: tuple[HostBatch, ...], values: tuple[Float[Array, "B S d_mem"], ...], config: Config, rules: Rules
) -> tuple[tuple[RowGradients, ...], tuple[RowGradients, ...]]:
    """The gradients of the hot rows (none without any), and of the rows that came from the host."""
    engram = config.model.engram
    assert engram is not None
    of_hot, of_cold = [], []
    for batch, of_layer in zip(host, values):
        by_row = of_layer.reshape(*batch.index.shape, engram.head_dim)
        hot, cold = collect_host(batch, by_row, hot_rows=engram.tables.hot_rows, rules=rules, capacity=engram.tables.capacity)
        of_hot += [] if hot is None else [hot]
        of_cold.append(cold)
    return tuple(of_hot), tuple(of_cold)


def updated_memory(
    memory: Memory, gradients: tuple[RowGradients, ...], rate: Float[Array, ""], scale: Float[Array, ""], config: Config, rules: Rules
) -> Memory:
    """The tables, or their hot rows, after a step with the network's learning rate; `scale` is what clipping makes of gradients."""
    assert config.model.engram is not None
    engram, results = config.model.engram, []
    sizes = (engram.tables.hot_rows,) * len(engram.layers) if on_host(config) else table_rows(engram)
    for num_rows, own, state, table in zip(sizes, gradients, memory.optimizer, memory.tables):
        clipped = own._replace(values=scale * own.values)
        update = table_optimizer(config, num_rows, rules).update
        results.append(update(clipped, state, table, rate * engram.tables.learning_rate_factor))
    return Memory(tuple(table for table, _ in results), tuple(state for _, state in results))


def to_plain(memory: Memory) -> dict[str, Any]:
    """Lists of arrays, as a checkpoint holds them."""
    return {"tables": list(memory.tables), "optimizer": [jax.tree.leaves(state) for state in memory.optimizer]}


def from_plain(like: Memory, plain: dict[str, Any]) -> Memory:
    """A memory of the structure of `like` from what `to_plain` made."""
    states = [jax.tree.unflatten(jax.tree.structure(state), leaves) for state, leaves in zip(like.optimizer, plain["optimizer"])]
    return Memory(tuple(plain["tables"]), tuple(states))


def rows_on_disk(config: Config) -> dict[str, int]:
    """How many rows of the arrays of `to_plain` are no padding, by their names in a checkpoint: those alone are saved."""
    memory = jax.eval_shape(lambda: initial_memory(config))
    if memory is None:
        return {}
    assert config.model.engram is not None
    names = {}
    for layer, (rows, leaves) in enumerate(zip(table_rows(config.model.engram), to_plain(memory)["optimizer"])):
        names[f"memory.tables.{layer}"] = rows
        names |= {f"memory.optimizer.{layer}.{i}": rows for i, leaf in enumerate(leaves) if leaf.ndim}
    return names
