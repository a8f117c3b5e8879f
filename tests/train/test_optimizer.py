"""The schedule, what decays, and what is left alone."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mhc_jax.config import OptimizerConfig, override
from mhc_jax.nn.decoder import Decoder
from mhc_jax.nn.module import named_parameters
from mhc_jax.train.loop import train
from mhc_jax.train.optimizer import adamw, decays, learning_rate, moments_in, optimizer, update_mask


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
    adam = adamw(OptimizerConfig(learning_rate=0.1))
    masked = jax.tree.map(jnp.multiply, noise, update_mask(model))
    updates, _ = adam.update(masked, adam.init(model), model)

    first = updates.dense_layers if dense_layers else updates.moe_layers
    n = config.connections.streams
    moved = np.asarray(first.attention_connection.bias[0]) != 0
    np.testing.assert_array_equal(moved, [False] * n + [True] * n + [False] * n * n)
    np.testing.assert_array_equal(np.asarray(first.attention_connection.alpha[0]) != 0, [False, True, False])
    # Everything else takes the full step that Adam makes of noise.
    assert np.all(np.asarray(first.ffn_connection.bias) != 0)
    assert np.all(np.asarray(updates.moe_layers.attention_connection.bias[-1]) != 0)


def test_mixing_that_a_mean_of_streams_cannot_see_never_moves(tiny):
    """The last H_res, of a kind whose column sums are exact; with a learned collapse it learns as any other."""
    for collapse, still in (("mean", True), ("sum", True), ("learned", False)):
        config = override(tiny, {"model.residual": "kromhc", "model.connections.collapse": collapse}).model
        model = jax.eval_shape(lambda config=config: Decoder(config, jax.random.key(0)))
        mask = jax.tree.map(jnp.asarray, update_mask(jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), model)))
        n, last = config.connections.streams, np.asarray(jnp.broadcast_to(mask.moe_layers.ffn_connection.bias, (2, 12)))[-1]
        np.testing.assert_array_equal(last, [1] * 2 * n + [0 if still else 1] * 4)
        assert np.all(np.asarray(mask.moe_layers.attention_connection.bias) == 1)


def orthogonalised(matrix):
    """Muon's direction for a matrix [rows, columns] at its first step: momentum is the gradient; then five steps of Newton and Schulz."""
    x = matrix / np.linalg.norm(matrix)
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    return 0.18 * np.sqrt(max(matrix.shape)) * x


def test_muon_takes_each_matrix_of_a_stack_by_itself_and_adamw_the_rest(tiny):
    model = jax.jit(lambda: Decoder(tiny.model, jax.random.key(0)))()
    rng = np.random.default_rng(0)
    gradient = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), model)
    config = OptimizerConfig(learning_rate=0.1, kind="muon", weight_decay=0.0)
    muon = optimizer(config)
    got, _ = jax.jit(muon.update)(gradient, muon.init(model), model)
    adam = adamw(config)
    wanted, _ = adam.update(gradient, adam.init(model), model)
    for name in ("embedding", "unembed", "final_norm"):
        np.testing.assert_allclose(getattr(got, name), getattr(wanted, name), rtol=1e-6)
    of_connection = (m.moe_layers.attention_connection.bias for m in (got, wanted))
    np.testing.assert_allclose(*of_connection, rtol=1e-6)

    heads, into, out = (getattr(gradient.moe_layers.attention, name)[0] for name in ("query", "latent", "out"))
    width = tiny.model.dim
    for name, matrix in (("query", heads.reshape(width, -1)), ("latent", into), ("out", out.reshape(-1, width))):
        direction = np.asarray(getattr(got.moe_layers.attention, name)[0]).reshape(matrix.shape)
        np.testing.assert_allclose(direction, orthogonalised(np.asarray(matrix, np.float64)), rtol=1e-4, atol=1e-5)
    for name in ("inner", "out"):
        expert = np.asarray(getattr(gradient.moe_layers.ffn, name)[0, 2], np.float64)
        np.testing.assert_allclose(getattr(got.moe_layers.ffn, name)[0, 2], orthogonalised(expert), rtol=1e-4, atol=1e-5)


def test_narrow_moments_are_the_wide_ones_rounded_after_each_update():
    """Against Adam written out, which rounds as numpy's bfloat16 does; wide moments are elsewhere by more than the tolerance."""
    rng, b1, b2 = np.random.default_rng(0), 0.9, 0.95
    gradients = rng.standard_normal((3, 5, 7)).astype(np.float32)
    parameters = jnp.zeros((5, 7))
    directions = []
    for adam in (moments_in(jnp.bfloat16, optax.scale_by_adam(b1, b2, 1e-20)), optax.scale_by_adam(b1, b2, 1e-20)):
        state = adam.init(parameters)
        for gradient in gradients:
            direction, state = jax.jit(adam.update)(jnp.asarray(gradient), state, parameters)
        directions.append(direction)
    mean, square = np.zeros((5, 7), jnp.bfloat16), np.zeros((5, 7), jnp.bfloat16)
    for step, gradient in enumerate(gradients, 1):
        m, v = b1 * mean.astype(float) + (1 - b1) * gradient, b2 * square.astype(float) + (1 - b2) * np.square(gradient, dtype=float)
        wanted = m / (1 - b1**step) / np.sqrt(v / (1 - b2**step))
        mean, square = (x.astype(np.float32).astype(jnp.bfloat16) for x in (m, v))
    np.testing.assert_allclose(directions[0], wanted, rtol=1e-5, atol=1e-6)
    assert np.abs(directions[1] - wanted).max() > 1e-4


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_all_moments_are_kept_in_the_type_that_is_asked_for(tiny, kind):
    model = jax.eval_shape(lambda: Decoder(tiny.model, jax.random.key(0)))
    types = {}
    for moments in ("float32", "bfloat16"):
        config = OptimizerConfig(learning_rate=0.1, kind=kind, moments=moments)
        state = jax.eval_shape(optimizer(config).init, model)
        types[moments] = {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim}
    assert types == {"float32": {jnp.dtype("float32")}, "bfloat16": {jnp.dtype("bfloat16")}}


@pytest.mark.slow
def test_muon_runs_save_and_resume(tiny, tmp_path):
    settings = {"optimizer.kind": "muon", "optimizer.moments": "bfloat16", "train.steps": 4, "model.residual": "residual"}
    config = override(tiny, settings)
    whole = train(config, tmp_path / "run", say=lambda line: None)
    (tmp_path / "run" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    assert train(config, tmp_path / "run", say=lambda line: None)["loss"] == whole["loss"]
