"""Muon on a mesh gives what optax's Muon gives on one device, whichever axes its matrices are split over."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mhc_jax.config import MeshConfig, OptimizerConfig, override
from mhc_jax.nn.decoder import Decoder
from mhc_jax.nn.module import named_parameters, specs
from mhc_jax.parallel.mesh import make_mesh, shardings
from mhc_jax.parallel.rules import Rules
from mhc_jax.train.muon import BETA, EPS, RMS
from mhc_jax.train.optimizer import matrix_axes, optimizer

CONFIG = OptimizerConfig(learning_rate=0.1, kind="muon", weight_decay=0.05)


def of_optax() -> optax.GradientTransformation:
    """Muon's function brings the sign of a descent along."""
    whole = optax.contrib.muon(
        1.0,
        beta=BETA,
        eps=EPS,
        weight_decay=CONFIG.weight_decay,
        consistent_rms=RMS,
        muon_weight_dimension_numbers=lambda model: jax.tree.map(matrix_axes, specs(model)),
    )
    return optax.chain(whole, optax.scale(-1.0))


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(fsdp=2, expert=2, tensor=2),
        pytest.param(MeshConfig(data=2, fsdp=4), marks=pytest.mark.slow),
        pytest.param(MeshConfig(expert=4, context=2), marks=pytest.mark.slow),
    ],
    ids=lambda mesh: "x".join(f"{name}{size}" for name, size in vars(mesh).items() if size > 1),
)
def test_eight_devices_give_what_optax_gives_on_one(tiny, mesh):
    config = override(tiny, {"model.residual": "residual", "model.moe.num_experts": 8, "model.attention.num_heads": 4})
    model = jax.jit(lambda: Decoder(config.model, jax.random.key(0)))()
    rng = np.random.default_rng(0)
    gradients = [jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), model) for _ in range(2)]

    def directions(transformation, model, gradients):
        state = transformation.init(model)
        for gradient in gradients:
            direction, state = transformation.update(gradient, state, model)
        return direction

    wanted = jax.jit(lambda *args: directions(of_optax(), *args))(model, gradients)
    here, rules = make_mesh(mesh), Rules()
    where = shardings(here, rules, specs(model), model)
    with jax.set_mesh(here):
        placed = jax.device_put((model, gradients), (where, [where] * 2))
        got = jax.jit(lambda *args: directions(optimizer(CONFIG, rules=rules), *args), out_shardings=where)(*placed)
    trained = {name for name, spec in named_parameters(specs(model)) if matrix_axes(spec) is not None}
    found = dict(named_parameters(got))
    assert len(trained) > 8
    for name, exact in named_parameters(wanted):
        if name in trained:
            np.testing.assert_allclose(found[name], exact, rtol=2e-4, atol=2e-5, err_msg=name)
