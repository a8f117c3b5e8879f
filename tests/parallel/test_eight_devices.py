"""Eight devices compute what one computes: every part of the network, on meshes of every axis, in float64.

So that the order of sums over devices does not blur the comparison; routing and choices of keys are the same then.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from small import FORMS, make, make_batch, relative, shaken, small, tree_relative, widened

from mhc_jax.config import MeshConfig
from mhc_jax.engram_config import EngramConfig
from mhc_jax.nn import expert_parallel
from mhc_jax.nn.decoder import batch_loss, initial_router_bias
from mhc_jax.nn.module import named_parameters, specs
from mhc_jax.parallel.mesh import make_mesh, shardings
from mhc_jax.parallel.rules import Rules
from mhc_jax.sparse_config import SparseConfig

SIZES = {"num_layers": 2, "attention__num_heads": 8, "moe__num_experts": 8, "moe__expert_dim": 8}
SPARSE = {"stage": "sparse", "index_heads": 8, "index_dim": 8, "top_k": 8, "query_chunk": 8}
MEMORY = {"layers": (1,), "table_sizes": (11, 13), "heads": 2, "head_dim": 4}
PARTS = {
    **{kind: {"residual": kind} for kind in FORMS},
    "qk_norm": {"residual": "residual", "attention__qk_norm": True},
    "groups": {"residual": "residual", "moe__num_groups": 4, "moe__top_groups": 2},
    "learned collapse": {"connections__collapse": "learned"},
    "sparse": {"residual": "residual", "attention__q_rank": 12, "attention__sparse": SparseConfig(**SPARSE)},
    "warmup": {"residual": "residual", "attention__q_rank": 12, "attention__sparse": SparseConfig(**SPARSE | {"stage": "warmup"})},
    "engram": {"engram": EngramConfig(**MEMORY, conv=False)},
    "engram with convolution": {"engram": EngramConfig(**MEMORY)},
}
MESHES = {
    "data 2 fsdp 4": MeshConfig(data=2, fsdp=4),
    "fsdp 8": MeshConfig(fsdp=8),
    "expert 8": MeshConfig(expert=8),
    "fsdp 2 expert 4": MeshConfig(fsdp=2, expert=4),
    "tensor 8": MeshConfig(tensor=8),
    "expert 2 tensor 4": MeshConfig(expert=2, tensor=4),
    "context 8": MeshConfig(context=8),
    "fsdp 2 context 2 tensor 2": MeshConfig(fsdp=2, context=2, tensor=2),
    "data 2 expert 2 context 2": MeshConfig(data=2, expert=2, context=2),
}
FAST = {("mhc", "fsdp 2 expert 4")}
SINGLE = {"fsdp 8", "expert 8", "tensor 8"}  # axes that other meshes have beside each other
CONTAINED = {"static_hc", "identity_hc", "engram"}  # what hc, mhc and engram with convolution do, less something


def marks(part: str, mesh: str) -> list[pytest.MarkDecorator]:
    """Slow: nearly every part on one mesh, and the plainest on most. The rest of the matrix is not for every day."""
    if (part, mesh) in FAST:
        return []
    often = mesh not in SINGLE if part == "residual" else (mesh == "fsdp 2 context 2 tensor 2" and part not in CONTAINED)
    return [pytest.mark.slow if often else pytest.mark.matrix]


CASES = [pytest.param(part, mesh, marks=marks(part, mesh)) for part in PARTS for mesh in MESHES]


@cache
def case(part: str):
    config = small(**SIZES, **PARTS[part])
    length = 80 if config.engram is not None else 16
    model, batch = widened(shaken(make(config))), make_batch(config, sequences=8, length=length)
    rng, memories = np.random.default_rng(0), 0 if config.engram is None else len(config.engram.layers)
    memory = tuple(rng.standard_normal((8, length, config.engram.width)) for _ in range(memories))
    if model.engram is not None and model.engram.conv is not None:
        model.engram.conv = model.engram.conv + rng.standard_normal(model.engram.conv.shape)  # it begins at zero
    return config, model, batch, memory


def differentiate(config, rules):
    def loss(model, memory, batch):
        total, count, aux = batch_loss(model, batch, initial_router_bias(config), memory=memory, rules=rules, trace=True)
        told = aux.trace, aux.gates, aux.max_attention_logit, aux.expert_load, aux.final_stream_rms
        return total / count + 100 * aux.balance_loss + aux.indexer_loss.sum(), told

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


@cache
def on_one_device(part: str):
    config, model, batch, memory = case(part)
    return differentiate(config, Rules())(model, memory, batch)


def on_a_mesh(part: str, mesh_config: MeshConfig):
    config, model, batch, memory = case(part)
    mesh, rules = make_mesh(mesh_config), Rules()
    with jax.set_mesh(mesh):
        placed = jax.device_put(model, shardings(mesh, rules, specs(model), model))
        split = jax.device_put((memory, batch), NamedSharding(mesh, rules.spec("batch", "sequence")))
        return differentiate(config, rules)(placed, *split), placed


def check(found, part: str) -> None:
    (loss, told), (grads, of_memory) = on_one_device(part)
    (loss_split, told_split), (grads_split, of_memory_split) = found
    assert relative(loss_split, loss) < 1e-13
    wanted = dict(named_parameters(grads))
    for name, grad in named_parameters(grads_split):
        assert relative(grad, wanted[name]) < 1e-10, name
    for a, b in zip(jax.tree.leaves((told_split, of_memory_split)), jax.tree.leaves((told, of_memory)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("part", "mesh"), CASES)
def test_loss_gradients_and_what_layers_tell_are_those_of_one_device(float64, part, mesh):
    found, placed = on_a_mesh(part, MESHES[mesh])
    check(found, part)
    shape, sizes = placed.unembed.addressable_shards[0].data.shape, MESHES[mesh]
    assert shape == (placed.unembed.shape[0] // sizes.fsdp, placed.unembed.shape[1] // sizes.tensor)
    experts = placed.moe_layers.ffn.inner
    assert experts.addressable_shards[0].data.shape[1] == experts.shape[1] // (sizes.expert * sizes.tensor)


def ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """What XLA has for TPU alone, by gathering everything; NaN where a device awaits another number of rows than it is sent."""
    given = (operand, input_offsets, send_sizes, output_offsets)
    operands, starts, sizes, places = (jax.lax.all_gather(a, axis_name) for a in given)
    me, row = jax.lax.axis_index(axis_name), jnp.arange(len(output))
    pieces = len(recv_sizes) // len(operands)  # from each device to each
    for peer, piece in np.ndindex(len(operands), pieces):
        start, size, place = (of_all[peer, me * pieces + piece] for of_all in (starts, sizes, places))
        came = operands[peer].at[row - place + start].get(mode="clip")
        came = jnp.where(size == recv_sizes[peer * pieces + piece], came, jnp.nan)
        here = ((row >= place) & (row < place + size)).reshape(-1, *(1,) * (output.ndim - 1))
        output = jnp.where(here, came, output)
    return output


@pytest.mark.parametrize("way", ["Padded", "Ragged"])
@pytest.mark.parametrize("room", [pytest.param(1.25, marks=pytest.mark.slow), 0.3, pytest.param(0.05, marks=pytest.mark.slow)])
def test_what_has_no_room_travels_in_further_rounds(float64, room, way, monkeypatch):
    """Room for a third of balanced visits, and for one: the same output and gradients, and no visit lost, when one expert gets most.

    Tokens are two tiles of columns; those of the other tests are less than one.
    """
    if way == "Ragged":
        monkeypatch.setattr(expert_parallel, "Padded", expert_parallel.Ragged)
        monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)
    monkeypatch.setattr(expert_parallel, "ROOM", room)
    rng = np.random.default_rng(0)
    x, inner, out = (jnp.asarray(rng.standard_normal(shape)) for shape in ((8, 4, 256), (8, 256, 12), (8, 6, 256)))
    experts = jnp.asarray(np.argsort(rng.standard_normal((8, 4, 8)) - 2 * (np.arange(8) == 5), axis=-1)[..., :2])
    weights, direction = jnp.asarray(rng.uniform(size=experts.shape)), jnp.asarray(rng.standard_normal(x.shape))

    def value_and_gradients(x, experts, weights, inner, out):
        y, pull = jax.vjp(lambda *learnt: expert_parallel.routed(learnt[0], experts, *learnt[1:], Rules()), x, weights, inner, out)
        return y, pull(direction)

    args = x, experts, weights, inner, out
    alone = jax.jit(value_and_gradients)(*args)
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))):
        together = jax.jit(value_and_gradients)(*args)
    assert tree_relative(together, alone) < 1e-12
