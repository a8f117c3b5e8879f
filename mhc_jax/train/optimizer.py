"""AdamW as the mHC paper sets it (arXiv 2512.24880, Table 5), or Muon for matrices; and which parameters are left alone."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array, Float

from mhc_jax.config import OptimizerConfig
from mhc_jax.nn.decoder import Decoder, learnable_mappings
from mhc_jax.nn.module import Spec, specs
from mhc_jax.parallel.rules import Rules
from mhc_jax.train.muon import muon
from mhc_jax.train.stages import of_indexer


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate of the step with this index (from 0): linear warm-up to the peak, then two steps down at shares of the run."""
    first, second = (round(point * steps) for point in config.decay_points)

    def schedule(step: Any) -> Float[Array, ""]:
        warm = jnp.minimum(1.0, (step + 1) / max(config.warmup_steps, 1))
        factor = jnp.where(step < first, 1.0, jnp.where(step < second, *config.decay_factors))
        return config.learning_rate * warm * factor

    return schedule


def adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adam on gradients that are already clipped, and decoupled weight decay on matrices: the direction, which the learning rate scales.

    Adam counts the updates that were made. The schedule does not go by that count, but by the step: a skipped update must not shift it.
    """
    return optax.chain(
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
    )


def optimizer(config: OptimizerConfig, *, only_indexer: bool = False, rules: Rules = Rules()) -> optax.GradientTransformation:
    """What `optimizer.kind` names: turns clipped gradients into a direction, which the learning rate scales.

    With `only_indexer` everything else gets no direction, no decay and no moments. `rules` say how parameters lie on the mesh that is set.
    """
    if only_indexer:
        parts = {"trained": optimizer(config, rules=rules), "frozen": optax.set_to_zero()}
        return optax.partition(parts, lambda model: jax.tree.map(lambda own: "trained" if own else "frozen", of_indexer(model)))
    found = adamw(config)
    if config.kind == "muon":
        of_matrices = optax.chain(muon(rules, matrix_axes), optax.add_decayed_weights(config.weight_decay))
        by_kind = {"muon": of_matrices, "adamw": found}
        found = optax.partition(by_kind, lambda model: jax.tree.map(lambda s: "adamw" if matrix_axes(s) is None else "muon", specs(model)))
    return found if config.moments == "float32" else moments_in(jnp.bfloat16, found)


def moments_in(dtype: Any, wide: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same with its moments rounded to a narrower type after each update, and widened for the next (arXiv 2412.19437, section 3.3.3).

    What an update adds to a moment must not be lost in rounding: bfloat16 holds 3 digits, so betas of 0.9 and 0.95 do, and 0.999 does not.
    """

    def narrow(state: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)

    def update(gradients: Any, state: Any, parameters: Any = None) -> tuple[Any, Any]:
        like = jax.eval_shape(wide.init, parameters)
        directions, state = wide.update(gradients, jax.tree.map(lambda x, own: x.astype(own.dtype), state, like), parameters)
        return directions, narrow(state)

    return optax.GradientTransformation(lambda parameters: narrow(wide.init(parameters)), update)


def matrix_axes(spec: Spec) -> optax.contrib.MuonDimensionNumbers | None:
    """Which axes of a parameter are the rows and the columns of a matrix, one for each layer and expert; None for what AdamW trains.

    AdamW has vectors, embedding and output head, as in DeepSeek-V4's training (arXiv 2606.19348) and Engram's (arXiv 2601.07372, Table 5).
    """
    if not spec.decay or "vocab" in spec.axes:
        return None
    axes = [i for i, name in enumerate(spec.axes) if name not in ("layers", "experts")]
    # Two axes, or three where heads stand apart: behind the input [C, heads, d], or, on the way back, before the output [heads, d, C].
    rows = axes[:-1] if spec.axes[-1] == "embed" else axes[:1]
    return optax.contrib.MuonDimensionNumbers(reduction_axis=tuple(rows), output_axis=tuple(axes[len(rows) :]))


def decays(model: Decoder) -> Any:
    """True in the place of every parameter that weight decay applies to."""
    return jax.tree.map(lambda spec: spec.decay, specs(model))


def update_mask(model: Decoder) -> Decoder:
    """A pytree like the model that broadcasts against it: 0 for parameters that must stay as they are, 1 elsewhere.

    Some mappings of the first sublayer, and for some kinds of the last, cannot change the output. Their gradients are rounding noise, and
    Adam with an epsilon of 1e-20 would turn that into full steps (see `learnable_mappings`).
    """
    mask = jax.tree.map(lambda p: jnp.ones((1,) * p.ndim, p.dtype), model)
    table, dense = learnable_mappings(model.config), 2 * model.config.dense_layers
    for stack, rows in (("dense_layers", table[:dense]), ("moe_layers", table[dense:])):
        for place, learns in (("attention_connection", rows[::2]), ("ffn_connection", rows[1::2])):
            if learns.all():
                continue
            connection = getattr(getattr(model, stack), place)
            for parameter, values in connection.update_mask(learns).items():
                ndim = getattr(connection, parameter).ndim
                setattr(getattr(getattr(mask, stack), place), parameter, values.reshape(values.shape + (1,) * (ndim - values.ndim)))
    return mask
