"""The schedule, what decays, and what is left alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhc_jax.config import OptimizerConfig, override
from mhc_jax.nn.decoder import Decoder
from mhc_jax.nn.module import named_parameters
from mhc_jax.train.optimizer import adamw, decays, learning_rate, update_mask


def test_schedule_warms_up_and_drops_twice():
    rate = learning_rate(OptimizerConfig(learning_rate=2.0, warmup_steps=10), steps=1000)
    at = {step: float(rate(step)) for step in (0, 4, 9, 799, 800, 899, 900, 999)}
    assert at == pytest.approx({0: 0.2, 4: 1.0, 9: 2.0, 799: 2.0, 800: 0.632, 899: 0.632, 900: 0.2, 999: 0.2}, rel=1e-6)


def test_only_matrices_decay(tiny):
    model = jax.eval_shape(lambda: Decoder(tiny.model, jax.random.key(0)))
    decaying = {name for name, decay in named_parameters(decays(model)) if decay}
    assert {"embedding", "unembed", "moe_layers.attention.expand", "moe_layers.ffn.router", "moe_layers.ffn_connection.phi"} <= decaying
    assert not any(name.endswith(("norm", "bias", "alpha")) for name in decaying)


@pytest.mark.parametrize("dense_layers", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_first_sublayers_idle_mappings_never_move(tiny, dense_layers):
    config = override(tiny, {"model.dense_layers": dense_layers}).model
    model = jax.jit(lambda: Decoder(config, jax.random.key(0)))()
    noise = jax.tree.map(lambda p: jnp.full_like(p, 1e-12), model)  # what rounding leaves where a gradient is zero
    optimizer = adamw(OptimizerConfig(learning_rate=0.1, warmup_steps=0), steps=10)
    masked = jax.tree.map(jnp.multiply, noise, update_mask(model))
    updates, _ = optimizer.update(masked, optimizer.init(model), model)

    first = updates.dense_layers if dense_layers else updates.moe_layers
    n = config.connections.streams
    moved = np.asarray(first.attention_connection.bias[0]) != 0
    np.testing.assert_array_equal(moved, [False] * n + [True] * n + [False] * n * n)
    np.testing.assert_array_equal(np.asarray(first.attention_connection.alpha[0]) != 0, [False, True, False])
    # Everything else takes the full step that Adam makes of noise.
    assert np.all(np.asarray(first.ffn_connection.bias) != 0)
    assert np.all(np.asarray(updates.moe_layers.attention_connection.bias[-1]) != 0)
