"""One optimizer step and one evaluation, as pure functions that are compiled once."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from mhc_jax.config import Config
from mhc_jax.nn.decoder import Decoder, batch_loss, initial_router_bias
from mhc_jax.nn.module import specs
from mhc_jax.nn.moe import updated_bias
from mhc_jax.nn.stability import Stability, stability
from mhc_jax.parallel.mesh import shardings
from mhc_jax.parallel.rules import Rules
from mhc_jax.tables.gradients import RowGradients
from mhc_jax.tables.host_device import HostBatch
from mhc_jax.train.memory import (
    Memory,
    gradients_of_rows,
    gradients_with_host,
    initial_memory,
    memory_shardings,
    on_host,
    read,
    read_with_host,
    updated_memory,
)
from mhc_jax.train.optimizer import learning_rate, optimizer, update_mask
from mhc_jax.train.stages import clip, only_indexer

Batch = dict[str, Int[Array, "B S *more"]]

# The TPU compiler leaves most collectives where their results are needed; with these, which MaxText's recipes use too, they run beside
# products that do not need them (docs/plan.md).
BESIDE_COMPUTING: dict[str, str | bool] = {
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
}


class TrainState(NamedTuple):
    """Everything that a step changes."""

    model: Decoder
    optimizer: Any
    router_bias: Float[Array, "L_moe E"]  # state, not a parameter: moved by the load, not by a gradient
    step: Int[Array, ""]  # optimizer steps taken, skipped ones included
    skipped_in_row: Int[Array, ""]  # steps up to this one whose update was skipped, without one between them that was not
    memory: Memory | None = None  # Engram's tables; those in host memory are no part of it, but for their hot rows


class StepMetrics(NamedTuple):
    """Scalars of one step; docs/results.md says what each is."""

    loss: Float[Array, ""]
    balance_loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    clipped: Float[Array, ""]
    learning_rate: Float[Array, ""]
    max_attention_logit: Float[Array, ""]
    expert_load_max: Float[Array, ""]
    skipped: Float[Array, ""]
    indexer_loss: Float[Array, ""] | None = None  # with sparse attention only
    indexer_grad_norm: Float[Array, ""] | None = None
    table_overflow: Int[Array, ""] | None = None  # with Engram only


def initial_state(config: Config) -> TrainState:
    """Parameters from the config's seed, an empty optimizer, biases at zero. Tables in host memory are made elsewhere (host_tables)."""
    model = Decoder(config.model, jax.random.key(config.train.seed))
    moments = optimizer(config.optimizer, only_indexer=only_indexer(config.model)).init(model)
    zero = jnp.zeros((), jnp.int32)
    tables = None if on_host(config) else initial_memory(config)
    return TrainState(model, moments, initial_router_bias(config.model), zero, zero, tables)


def placed_initial_state(config: Config, mesh: Mesh, rules: Rules) -> TrainState:
    """The initial state, each array made where it lies."""
    # Run once: without LLVM's optimisations it compiles in a third of the time on a CPU.
    make = jax.jit(lambda: initial_state(config), out_shardings=state_shardings(config, mesh, rules))
    return make.lower().compile(compiler_options={"xla_backend_optimization_level": "0"})()


def state_shardings(config: Config, mesh: Mesh, rules: Rules) -> Any:
    """A `TrainState` with the sharding of each array: the optimizer's moments with their parameters, everything small on every device."""
    shape = jax.eval_shape(lambda: initial_state(config))
    whole = NamedSharding(mesh, PartitionSpec())
    of_model = shardings(mesh, rules, specs(shape.model), shape.model)
    by_path = dict(jax.tree_util.tree_leaves_with_path(of_model))

    def like_parameters(part: Any) -> Any:
        """Moments have the paths of their parameters; an optimizer of some parameters has moments for those alone."""
        return jax.tree_util.tree_map_with_path(lambda path, _: by_path[path], part) if isinstance(part, Decoder) else whole

    of_optimizer = jax.tree.map(like_parameters, shape.optimizer, is_leaf=lambda part: isinstance(part, Decoder))
    of_tables = None if on_host(config) else memory_shardings(config, mesh, rules)
    return TrainState._make((of_model, of_optimizer, whole, whole, whole, of_tables))


class Gradients(NamedTuple):
    """Gradients of the mean loss over a batch, and what its layers told."""

    model: Decoder
    memory: tuple[Float[Array, "B S d_mem"], ...]  # of what the batch read from tables: each token's own, not summed over rows
    loss: Float[Array, ""]
    balance_loss: Float[Array, ""]
    indexer_loss: Float[Array, ""]  # nats a token, mean over layers
    max_attention_logit: Float[Array, ""]
    expert_load: Int[Array, "L_moe E"]


def gradients(state: TrainState, batch: Batch, config: Config, rules: Rules, memory: tuple[Array, ...] = ()) -> Gradients:
    """Of the loss, the balance loss and the indexer's, with respect to network and `memory`; of the last alone where the rest is frozen.

    Microbatches are weighted by their numbers of targets, so that any number of them gives the gradients of the whole batch.
    """
    parts = config.train.microbatches
    targets = jnp.maximum((batch["targets"] >= 0).sum(), 1)
    tokens, frozen = batch["tokens"].size, only_indexer(config.model)

    def objective(learnt: tuple[Decoder, tuple[Array, ...]], part: Batch):
        model, memory = learnt
        total, _, aux = batch_loss(model, part, state.router_bias, memory=memory, rules=rules)
        loss, balance, indexer = total / targets, aux.balance_loss / parts, aux.indexer_loss / tokens
        # Each layer's indexer has its own loss, so their sum trains each as if it were alone.
        own = indexer.sum() if frozen else loss + balance + indexer.sum()
        return own, (loss, balance, indexer.mean(), aux.max_attention_logit.max(), aux.expert_load)

    differentiate = jax.grad(objective, has_aux=True)
    if parts == 1:
        grads, told = differentiate((state.model, memory), batch)
        return Gradients(*grads, *told)

    # Microbatch m takes every parts-th sequence: the batch axis, which devices share, stays in one piece.
    split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), (batch, memory))

    def accumulate(carry, part):
        (sums, largest), (part, memory) = carry, part
        (grads, of_memory), (loss, balance, indexer, logit, load) = differentiate((state.model, memory), part)
        return (jax.tree.map(jnp.add, sums, (grads, loss, balance, indexer, load)), jnp.maximum(largest, logit)), of_memory

    zeros = (jax.tree.map(jnp.zeros_like, state.model), *(jnp.zeros(()),) * 3, jnp.zeros(state.router_bias.shape, jnp.int32))
    ((grads, loss, balance, indexer, load), largest), of_memory = jax.lax.scan(accumulate, (zeros, jnp.array(-jnp.inf)), split)
    of_memory = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), of_memory)
    return Gradients(grads, of_memory, loss, balance, indexer, largest, load)


def train_step(state: TrainState, batch: Batch, *, config: Config, rules: Rules) -> tuple[TrainState, StepMetrics]:
    """One optimizer step on one batch.

    Where the loss or the gradient norm is not finite, nothing but the step count moves: model, optimizer, router bias and tables stay as
    they are. The gradient norm that is clipped is that of network and tables together.
    """
    new, metrics, _ = _stepped(state, batch, None, config, rules)
    return new, metrics


def train_step_with_host(
    state: TrainState, batch: Batch, host: tuple[HostBatch, ...], *, config: Config, rules: Rules
) -> tuple[TrainState, StepMetrics, tuple[RowGradients, ...]]:
    """The same with tables in host memory: `host` holds what each layer reads, in the place of the batch's `engram_rows`.

    The gradients are those of the rows in `host`, clipped; where the step was skipped, nothing may be done with them.
    """
    return _stepped(state, batch, host, config, rules)


def _stepped(
    state: TrainState, batch: Batch, host: tuple[HostBatch, ...] | None, config: Config, rules: Rules
) -> tuple[TrainState, StepMetrics, tuple[RowGradients, ...]]:
    rows = batch.get("engram_rows")
    of_rows: tuple[RowGradients, ...] = ()  # for the optimizer of the tables on the devices
    of_host: tuple[RowGradients, ...] = ()
    with jax.named_scope("engram"):
        memory, overflow = read(state.memory, rows, config, rules) if host is None else read_with_host(state.memory, host, config, rules)
    found = gradients(state, batch, config, rules, memory)
    grads = jax.tree.map(jnp.multiply, found.model, update_mask(state.model))
    with jax.named_scope("engram"):
        if host is not None:
            of_rows, of_host = gradients_with_host(host, found.memory, config, rules)
        elif rows is not None:
            of_rows = gradients_of_rows(rows, found.memory, config, rules)
    clipping = clip(grads, [g.values for g in (*of_rows, *of_host)], config)
    rate = learning_rate(config.optimizer, config.train.steps)(state.step)
    frozen, load = only_indexer(config.model), found.expert_load

    def updated(model: Decoder, moments: Any, router_bias: Array, memory: Memory | None) -> tuple[Decoder, Any, Array, Memory | None]:
        directions, moments = optimizer(config.optimizer, only_indexer=frozen, rules=rules).update(clipping.of_model(grads), moments, model)
        model = jax.tree.map(lambda p, d: p - rate * d, model, directions)
        if frozen:
            return model, moments, router_bias, memory
        if memory is not None:
            memory = updated_memory(memory, of_rows, rate, clipping.scale, config, rules)
        return model, moments, updated_bias(router_bias, load, config.model.moe.bias_rate), memory

    # The whole update stands in the branch, where XLA does it in place. Choosing afterwards between the old and the new state, by a branch
    # or for each element, needs both: a second copy of the state, by the compiler's count.
    good = jnp.isfinite(found.loss) & clipping.finite
    moved = (state.model, state.optimizer, state.router_bias, state.memory)
    with jax.named_scope("optimizer"):
        model, moments, router_bias, tables = jax.lax.cond(good, updated, lambda *old: old, *moved)
    new = TrainState(model, moments, router_bias, state.step + 1, jnp.where(good, 0, state.skipped_in_row + 1), tables)
    mean_load = jnp.maximum(load.mean(axis=-1, keepdims=True), 1.0)
    metrics = StepMetrics(
        loss=found.loss,
        balance_loss=found.balance_loss,
        grad_norm=clipping.norm,
        clipped=clipping.clipped,
        learning_rate=rate,
        max_attention_logit=found.max_attention_logit,
        expert_load_max=(load / mean_load).max(initial=0.0),
        skipped=1.0 - good,
        table_overflow=None if config.model.engram is None else overflow,
        indexer_loss=None if config.model.attention.sparse is None else found.indexer_loss,
        indexer_grad_norm=clipping.indexer_norm,
    )
    return new, metrics, tuple(own._replace(values=clipping.scale * own.values) for own in of_host)


def _compiled(
    lowered: jax.stages.Lowered, devices: set[jax.Device], memory_bytes: int | None, again: Callable[[], None]
) -> jax.stages.Compiled:
    """With collectives beside products on several TPUs, unless what is then under way takes more memory than a device has."""
    if len(devices) > 1 and all(device.platform == "tpu" for device in devices):
        try:
            compiled = lowered.compile(compiler_options=BESIDE_COMPUTING)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
        else:
            if memory_bytes is None or (_peak(compiled) or 0) <= memory_bytes:
                return compiled
        again()
    return lowered.compile()


def _peak(compiled: jax.stages.Compiled) -> int | None:
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes - memory.alias_size_in_bytes


def _memory_here(devices: set[jax.Device]) -> int | None:
    """Bytes of one of this process's devices, where it tells. Processes must agree, and another's devices tell a process nothing."""
    own = next((device for device in devices if device.process_index == jax.process_index()), None)
    try:
        return ((own and own.memory_stats()) or {}).get("bytes_limit")
    except jax.errors.JaxRuntimeError:  # one that is only compiled for
        return None


class Evaluation(NamedTuple):
    """Of one held-out batch."""

    loss: Float[Array, ""]  # nats, summed over the targets
    targets: Int[Array, ""]
    indexer_loss: Float[Array, ""] | None  # nats a token, mean over layers; with sparse attention only
    stability: Stability  # of its first sequence


def eval_step(
    model: Decoder,
    router_bias: Array,
    memory: Memory | None,
    batch: Batch,
    host: tuple[HostBatch, ...] | None = None,
    *,
    config: Config,
    rules: Rules,
) -> Evaluation:
    """Loss and stability measures of a held-out batch.

    `host` is as in `train_step_with_host`.
    """
    values, _ = read(memory, batch.get("engram_rows"), config, rules) if host is None else read_with_host(memory, host, config, rules)
    total, count, aux = batch_loss(model, batch, router_bias, memory=values, rules=rules, trace=True)
    indexer = None if config.model.attention.sparse is None else aux.indexer_loss.mean() / batch["tokens"].size
    return Evaluation(total, count, indexer, stability(aux))


def compile_train_step(
    config: Config,
    rules: Rules,
    state: TrainState,
    batch: Any,
    host: tuple[Any, ...] | None = None,
    *,
    memory_bytes: int | None = None,
    again: Callable[[], None] = lambda: None,
) -> tuple[Callable[..., Any], int | None]:
    """The compiled step, which takes over the memory of the state it is given; and its peak memory in bytes on one device.

    The batch may be arrays or their shapes. With `host`, what came from host memory, the step is `train_step_with_host`. `memory_bytes` is
    what a device has, where it is not here to tell; `again` is called where the step is compiled a second time, to take less.

    The peak is the compiler's: arguments, results and temporaries, shared memory counted once; None where it does not tell.
    """
    function, arguments = (train_step, (state, batch)) if host is None else (train_step_with_host, (state, batch, host))
    # The next step takes what this one returns, so it must lie where it lay: left to itself, XLA chooses other axes of some meshes.
    where = jax.tree.map(lambda x: x.sharding, state)
    step = jax.jit(
        partial(function, config=config, rules=rules), donate_argnums=0, out_shardings=(where, *(None,) * (1 if host is None else 2))
    )
    devices = where.step.device_set
    compiled = _compiled(step.lower(*arguments), devices, memory_bytes or _memory_here(devices), again)
    return compiled, _peak(compiled)
