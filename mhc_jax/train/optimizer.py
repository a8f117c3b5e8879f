"""AdamW as the mHC paper sets it (arXiv 2512.24880, Table 5), and which parameters it leaves alone."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from mhc_jax.config import OptimizerConfig
from mhc_jax.nn.decoder import Decoder
from mhc_jax.nn.module import specs


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate of the step with this index (from 0): linear warm-up to the peak, then two steps down at shares of the run."""
    first, second = (round(point * steps) for point in config.decay_points)

    def schedule(step: Any) -> Float[Array, ""]:
        warm = jnp.minimum(1.0, (step + 1) / max(config.warmup_steps, 1))
        factor = jnp.where(step < first, 1.0, jnp.where(step < second, *config.decay_factors))
        return config.learning_rate * warm * factor

    return schedule


def adamw(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Adam on gradients that are already clipped, decoupled weight decay on matrices, the schedule's learning rate."""
    return optax.chain(
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
        optax.scale_by_learning_rate(learning_rate(config, steps)),
    )


def decays(model: Decoder) -> Any:
    """True in the place of every parameter that weight decay applies to."""
    return jax.tree.map(lambda spec: spec.decay, specs(model))


def update_mask(model: Decoder) -> Decoder:
    """A pytree like the model that broadcasts against it: 0 for parameters that must stay as they are, 1 elsewhere.

    At the network's first sublayer all streams are equal copies, so that some mappings cannot change the output. Their gradients are
    rounding noise, and Adam with an epsilon of 1e-20 would turn that into full steps (see `Connection.LEARNS_FROM_EQUAL_STREAMS`).
    """
    mask = jax.tree.map(lambda p: jnp.ones((1,) * p.ndim, p.dtype), model)
    name = "dense_layers" if model.dense_layers is not None else "moe_layers"
    connection = getattr(model, name).attention_connection
    first = jnp.arange(getattr(model, name).attention_norm.shape[0]) == 0
    for parameter, values in connection.update_mask(first).items():
        ndim = getattr(connection, parameter).ndim
        setattr(getattr(mask, name).attention_connection, parameter, values.reshape(values.shape + (1,) * (ndim - values.ndim)))
    return mask
