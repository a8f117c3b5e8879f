"""Rules, meshes and shards. What networks compute on meshes: test_eight_devices."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from small import relative

from mhc_jax.config import MeshConfig
from mhc_jax.errors import UserError
from mhc_jax.parallel.mesh import make_mesh
from mhc_jax.parallel.rules import Rules
from mhc_jax.parallel.shards import first_sequence, on_shards, with_halo


def test_a_rule_says_where_each_axis_goes():
    assert Rules().spec("layers", "embed", None, "hidden") == PartitionSpec(None, "fsdp", None, "tensor")
    assert Rules().spec("batch") == PartitionSpec(("data", "fsdp", "expert"))


def test_two_axes_on_one_mesh_axis_are_refused_and_both_are_named():
    with pytest.raises(ValueError, match=r"'embed' and 'vocab'.*'fsdp'"):
        Rules(vocab="fsdp").spec("embed", "vocab")
    with pytest.raises(ValueError, match=r"'experts' and 'hidden'.*'tensor'"):
        Rules().spec("experts", "embed", "hidden")
    with pytest.raises(ValueError, match=r"'batch' and 'embed'.*'fsdp'"):
        Rules().spec("batch", "embed")


def test_an_unknown_axis_is_refused_and_the_known_ones_are_listed():
    with pytest.raises(ValueError, match=r"'colour'.*batch.*vocab"):
        Rules().spec("colour")


def test_a_mesh_larger_than_the_machine_is_refused_with_both_numbers():
    with pytest.raises(UserError, match=r"mesh.data x mesh.tensor = 4 x 4 asks for 16 devices, but 8 are present"):
        make_mesh(MeshConfig(data=4, tensor=4))


def test_a_mesh_that_leaves_a_process_without_devices_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(process_index=index // 2) for index in range(8)])
    with pytest.raises(UserError, match=r"the mesh has 4 of 8 devices, which leaves process 2, 3 without any"):
        make_mesh(MeshConfig(fsdp=4))


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (2, 4, 1, 1, 1), (1, 2, 1, 1, 2), (1, 3, 1, 1, 1), (1, 1, 2, 2, 2)])
def test_a_mesh_takes_the_first_devices(sizes):
    config = MeshConfig(*sizes)
    mesh = make_mesh(config)
    assert tuple(mesh.shape.items()) == tuple(zip(("data", "fsdp", "expert", "context", "tensor"), sizes))
    assert list(mesh.devices.flat) == jax.devices()[: config.devices]


def test_a_function_on_shards_sees_its_own_tokens_and_whole_parameters():
    """Values, and gradients of tokens and of the replicated matrix, equal those without a mesh."""
    rng = np.random.default_rng(0)
    x, w = jnp.asarray(rng.standard_normal((16, 3)), jnp.float32), jnp.asarray(rng.standard_normal((3, 5)), jnp.float32)
    weight, seen = jnp.asarray(rng.standard_normal((16, 5)), jnp.float32), []

    def f(x, w):
        seen.append((x.shape, w.shape))
        return jnp.tanh(x @ w)

    def loss(x, w):
        return (weight * on_shards(f, Rules(), given=(("tokens", None), None), results=("tokens", None))(x, w)).sum()

    differentiate = jax.value_and_grad(loss, argnums=(0, 1))
    alone = differentiate(x, w)
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, context=2, tensor=2))):
        together = jax.jit(differentiate)(x, w)
    assert seen[0] == ((16, 3), (3, 5))
    assert seen[-1] == ((2, 3), (3, 5))
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone)):
        assert relative(a, b) < 1e-5


@pytest.mark.parametrize("sizes", [(2, 1, 1, 1, 1), (1, 2, 1, 2, 2), (1, 1, 1, 4, 2)])
def test_the_first_sequence_of_tokens_last_is_in_order(sizes):
    """Whatever the order of tokens on their one axis, which follows the devices."""
    batch, length = 4, 16
    x = jnp.arange(batch * length).reshape(batch, length)
    with jax.set_mesh(make_mesh(MeshConfig(*sizes))):
        flat = on_shards(lambda x: x.reshape(1, -1), Rules(), given=(("batch", "sequence"),), results=(None, "tokens"))
        got = jax.jit(lambda x: first_sequence(flat(x), batch, Rules()))(x)
    assert np.array_equal(got, x[:1])


def test_a_halo_is_what_the_device_before_has_last():
    x = jnp.arange(1, 33).reshape(2, 16)
    with jax.set_mesh(make_mesh(MeshConfig(context=2, tensor=2, data=2))):
        f = on_shards(lambda x: with_halo(x, 3, Rules()), Rules(), given=(("batch", "sequence"),), results=("batch", "sequence"))
        got = np.asarray(jax.jit(f)(x)).reshape(2, 4, 7)
    padded = np.pad(np.asarray(x), ((0, 0), (3, 0)))
    assert np.array_equal(got, np.stack([padded[:, 4 * part : 4 * part + 7] for part in range(4)], axis=1))
