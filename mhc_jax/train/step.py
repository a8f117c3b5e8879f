"""One optimizer step and one evaluation, as pure functions that are compiled once."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from mhc_jax.config import Config
from mhc_jax.nn.decoder import Decoder, batch_loss, initial_router_bias
from mhc_jax.nn.module import specs
from mhc_jax.nn.moe import updated_bias
from mhc_jax.nn.stability import Stability, stability
from mhc_jax.parallel.mesh import shardings
from mhc_jax.parallel.rules import Rules
from mhc_jax.train.optimizer import adamw, learning_rate, update_mask

Batch = dict[str, Int[Array, "B S"]]


class TrainState(NamedTuple):
    """Everything that a step changes."""

    model: Decoder
    optimizer: Any
    router_bias: Float[Array, "L_moe E"]  # state, not a parameter: moved by the load, not by a gradient
    step: Int[Array, ""]  # optimizer steps taken


class StepMetrics(NamedTuple):
    """Scalars of one step; docs/results.md says what each is."""

    loss: Float[Array, ""]
    balance_loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    clipped: Float[Array, ""]
    learning_rate: Float[Array, ""]
    max_attention_logit: Float[Array, ""]
    expert_load_max: Float[Array, ""]


def initial_state(config: Config) -> TrainState:
    """Parameters from the config's seed, an empty optimizer, biases at zero."""
    model = Decoder(config.model, jax.random.key(config.train.seed))
    optimizer = adamw(config.optimizer, config.train.steps).init(model)
    return TrainState(model, optimizer, initial_router_bias(config.model), jnp.zeros((), jnp.int32))


def placed_initial_state(config: Config, mesh: Mesh, rules: Rules) -> TrainState:
    """The initial state, each array made where it lies."""
    # Run once: without LLVM's optimisations it compiles in a third of the time on a CPU.
    make = jax.jit(lambda: initial_state(config), out_shardings=state_shardings(config, mesh, rules))
    return make.lower().compile(compiler_options={"xla_backend_optimization_level": "0"})()


def state_shardings(config: Config, mesh: Mesh, rules: Rules) -> Any:
    """A `TrainState` with the sharding of each array: the optimizer's moments with their parameters, everything small on every device."""
    shape = jax.eval_shape(lambda: initial_state(config))
    whole = NamedSharding(mesh, PartitionSpec())
    of_model = shardings(mesh, rules, specs(shape.model))
    of_optimizer = optax.tree_utils.tree_map_params(
        adamw(config.optimizer, config.train.steps),
        lambda _, sharding: sharding,
        shape.optimizer,
        of_model,
        transform_non_params=lambda _: whole,
    )
    return TrainState._make((of_model, of_optimizer, whole, whole))


def gradients(
    state: TrainState, batch: Batch, config: Config, rules: Rules
) -> tuple[Decoder, Float[Array, ""], Float[Array, ""], Float[Array, ""], Int[Array, "L_moe E"]]:
    """Gradients of the mean loss over the batch, and its loss, balance loss, largest attention logit and expert load.

    Microbatches are weighted by their numbers of targets, so that any number of them gives the gradients of the whole batch.
    """
    parts = config.train.microbatches
    targets = jnp.maximum((batch["targets"] >= 0).sum(), 1)

    def objective(model: Decoder, part: Batch):
        total, _, aux = batch_loss(model, part, state.router_bias, rules=rules)
        loss, balance = total / targets, aux.balance_loss / parts
        return loss + balance, (loss, balance, aux.max_attention_logit.max(), aux.expert_load)

    differentiate = jax.grad(objective, has_aux=True)
    if parts == 1:
        grads, aux = differentiate(state.model, batch)
        return grads, *aux

    # Microbatch m takes every parts-th sequence: the batch axis, which devices share, stays in one piece.
    split = {name: x.reshape(-1, parts, x.shape[-1]).swapaxes(0, 1) for name, x in batch.items()}

    def accumulate(carry, part):
        sums, largest = carry
        grads, (loss, balance, logit, load) = differentiate(state.model, part)
        return (jax.tree.map(jnp.add, sums, (grads, loss, balance, load)), jnp.maximum(largest, logit)), None

    zeros = (jax.tree.map(jnp.zeros_like, state.model), jnp.zeros(()), jnp.zeros(()), jnp.zeros(state.router_bias.shape, jnp.int32))
    ((grads, loss, balance, load), largest), _ = jax.lax.scan(accumulate, (zeros, jnp.array(-jnp.inf)), split)
    return grads, loss, balance, largest, load


def train_step(state: TrainState, batch: Batch, *, config: Config, rules: Rules) -> tuple[TrainState, StepMetrics]:
    """One optimizer step on one batch."""
    grads, loss, balance, largest, load = gradients(state, batch, config, rules)
    grads = jax.tree.map(jnp.multiply, grads, update_mask(state.model))
    norm = optax.tree.norm(grads)
    limit = config.optimizer.clip_norm
    grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, limit / jnp.maximum(norm, limit)), grads)
    updates, optimizer = adamw(config.optimizer, config.train.steps).update(grads, state.optimizer, state.model)
    new = TrainState(
        model=optax.apply_updates(state.model, updates),
        optimizer=optimizer,
        router_bias=updated_bias(state.router_bias, load, config.model.moe.bias_rate),
        step=state.step + 1,
    )
    mean_load = jnp.maximum(load.mean(axis=-1, keepdims=True), 1.0)
    metrics = StepMetrics(
        loss=loss,
        balance_loss=balance,
        grad_norm=norm,
        clipped=(norm > limit).astype(jnp.float32),
        learning_rate=learning_rate(config.optimizer, config.train.steps)(state.step),
        max_attention_logit=largest,
        expert_load_max=(load / mean_load).max(initial=0.0),
    )
    return new, metrics


def eval_step(model: Decoder, router_bias: Array, batch: Batch, *, rules: Rules) -> tuple[Array, Array, Stability]:
    """Summed loss in nats and number of targets of a held-out batch, and the stability measures of its first sequence."""
    total, count, aux = batch_loss(model, batch, router_bias, rules=rules, trace=True)
    return total, count, stability(aux)


def compile_train_step(config: Config, rules: Rules, state: TrainState, batch: Any) -> tuple[Callable[..., Any], int | None]:
    """The compiled step, which takes over the memory of the state it is given; and its peak memory in bytes on one device.

    The batch may be arrays or their shapes.

    The peak is the compiler's: arguments, results and temporaries, shared memory counted once; None where it does not tell.
    """
    step = jax.jit(partial(train_step, config=config, rules=rules), donate_argnums=0)
    compiled = step.lower(state, batch).compile()
    memory = compiled.memory_analysis()
    if memory is None:
        return compiled, None
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes - memory.alias_size_in_bytes
    return compiled, peak
