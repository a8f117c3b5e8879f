"""Rules, meshes and token shards; and that eight devices compute what one computes."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from small import KINDS, make, make_batch, relative, shaken, small, widened

from mhc_jax.config import MeshConfig
from mhc_jax.errors import UserError
from mhc_jax.nn.decoder import batch_loss, initial_router_bias
from mhc_jax.nn.module import named_parameters, specs
from mhc_jax.parallel.mesh import make_mesh, shardings
from mhc_jax.parallel.rules import Rules
from mhc_jax.parallel.shards import on_token_shards


def test_a_rule_says_where_each_axis_goes():
    assert Rules().spec("layers", "embed", None, "hidden") == PartitionSpec(None, "fsdp", None, None)
    assert Rules().spec("batch") == PartitionSpec(("data", "fsdp"))


def test_two_axes_on_one_mesh_axis_are_refused_and_both_are_named():
    with pytest.raises(ValueError, match=r"'embed' and 'vocab'.*'fsdp'"):
        Rules(vocab="fsdp").spec("embed", "vocab")
    with pytest.raises(ValueError, match=r"'batch' and 'embed'.*'fsdp'"):
        Rules().spec("batch", "embed")


def test_an_unknown_axis_is_refused_and_the_known_ones_are_listed():
    with pytest.raises(ValueError, match=r"'colour'.*batch.*vocab"):
        Rules().spec("colour")


def test_a_mesh_larger_than_the_machine_is_refused_with_both_numbers():
    with pytest.raises(UserError, match=r"4 x 4 asks for 16 devices, but 8 are present"):
        make_mesh(MeshConfig(data=4, fsdp=4))


@pytest.mark.parametrize(("data", "fsdp"), [(1, 1), (2, 4), (8, 1), (1, 3)])
def test_a_mesh_takes_the_first_devices(data, fsdp):
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp))
    assert mesh.shape == {"data": data, "fsdp": fsdp}
    assert list(mesh.devices.flat) == jax.devices()[: data * fsdp]


def test_a_function_on_token_shards_sees_its_own_tokens_and_whole_parameters():
    """Values, and gradients of tokens and of the replicated matrix, equal those without a mesh."""
    rng = np.random.default_rng(0)
    x, w = jnp.asarray(rng.standard_normal((16, 3)), jnp.float32), jnp.asarray(rng.standard_normal((3, 5)), jnp.float32)
    weight, seen = jnp.asarray(rng.standard_normal((16, 5)), jnp.float32), []

    def f(x, w):
        seen.append((x.shape, w.shape))
        return jnp.tanh(x @ w)

    def loss(x, w):
        return (weight * on_token_shards(f, Rules(), tokens=(0, None))(x, w)).sum()

    differentiate = jax.value_and_grad(loss, argnums=(0, 1))
    alone = differentiate(x, w)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=4))):
        together = jax.jit(differentiate)(x, w)
    assert seen[0] == ((16, 3), (3, 5))
    assert seen[-1] == ((2, 3), (3, 5))
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone)):
        assert relative(a, b) < 1e-5


@cache
def case(kind: str):
    config = small(residual=kind, num_layers=2)
    return config, widened(shaken(make(config))), make_batch(config, sequences=8)


def differentiate(config, rules):
    def loss(model, batch):
        total, count, aux = batch_loss(model, batch, initial_router_bias(config), rules=rules)
        return total / count + 100 * aux.balance_loss

    return jax.jit(jax.value_and_grad(loss))


@cache
def on_one_device(kind: str):
    config, model, batch = case(kind)
    return differentiate(config, Rules())(model, batch)


MESHES = [(2, 4), (8, 1), (1, 8)]
CASES = [pytest.param(kind, *mesh, marks=[] if mesh == (2, 4) and kind == "mhc" else pytest.mark.slow) for kind in KINDS for mesh in MESHES]


@pytest.mark.parametrize(("kind", "data", "fsdp"), CASES)
def test_eight_devices_give_the_loss_and_gradients_of_one(float64, kind, data, fsdp):
    """In float64, so that the order of sums over devices does not blur the comparison."""
    config, model, batch = case(kind)
    loss, grads = on_one_device(kind)
    mesh, rules = make_mesh(MeshConfig(data=data, fsdp=fsdp)), Rules()
    with jax.set_mesh(mesh):
        placed = jax.device_put(model, shardings(mesh, rules, specs(model)))
        split = jax.device_put(batch, NamedSharding(mesh, rules.spec("batch", None)))
        loss_split, grads_split = differentiate(config, rules)(placed, split)
    assert relative(loss_split, loss) < 1e-13
    wanted = dict(named_parameters(grads))
    for name, grad in named_parameters(grads_split):
        assert relative(grad, wanted[name]) < 1e-10, name
    if fsdp > 1:
        assert placed.unembed.addressable_shards[0].data.shape == (config.dim // fsdp, config.vocab_size)
