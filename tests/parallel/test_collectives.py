"""What devices exchange in a step, from the compiled program: no more than the sharding needs, and nothing of streams or of all experts."""

import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from small import BASE

from mhc_jax.config import override
from mhc_jax.nn.expert_parallel import FURTHER_ROUNDS, ROOM
from mhc_jax.nn.module import named_parameters
from mhc_jax.parallel.mesh import make_mesh
from mhc_jax.parallel.rules import Rules
from mhc_jax.train.step import gradients, initial_state, state_shardings

SEQUENCES, LENGTH, WIDTH, VOCABULARY, EXPERTS, HIDDEN = 16, 64, 64, 512, 8, 32
SHAPE = {
    "model.residual": "mhc",
    "model.num_layers": 2,
    "model.dim": WIDTH,
    "model.vocab_size": VOCABULARY,
    "model.moe.num_experts": EXPERTS,
    "model.moe.expert_dim": HIDDEN,
    "model.attention.num_heads": 8,
    "model.loss_chunk": LENGTH,
    "data.seq_len": LENGTH,
    "train.batch_size": SEQUENCES,
}
COLLECTIVE = re.compile(r" = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


def exchanged(config, mesh):
    """Kind and shapes of every collective for one gradient, but those of further rounds of experts: no other loop is left here."""
    rules = Rules()
    state = jax.eval_shape(lambda: initial_state(config))
    places = state_shardings(config, mesh, rules)
    state = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, places)
    tokens = jax.ShapeDtypeStruct((SEQUENCES, LENGTH), jnp.int32, sharding=NamedSharding(mesh, rules.spec("batch", "sequence")))
    batch = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), tokens)
    with jax.set_mesh(mesh):
        text = jax.jit(lambda state, batch: gradients(state, batch, config, rules)).lower(state, batch).compile().as_text()
    for line in text.splitlines():
        if not (found := COLLECTIVE.search(line)) or FURTHER_ROUNDS in line:
            continue
        shapes, kind = found.groups()
        yield kind, [tuple(map(int, filter(None, dims.split(",")))) for dims in re.findall(r"\[([\d,]*)\]", shapes)]


def by_hand(config):
    """Numbers that one device is left with, by kind: mesh.fsdp 2, mesh.expert 4, layers gathered forward and backward."""
    mesh = config.mesh
    sizes = {name: math.prod(p.shape) for name, p in named_parameters(jax.eval_shape(lambda: initial_state(config)).model)}
    experts = sum(size for name, size in sizes.items() if re.search(r"moe_layers\.ffn\.(inner|out)$", name)) // mesh.expert
    ends = VOCABULARY * WIDTH  # embedding or output head
    layers = sum(sizes.values()) - 2 * ends - experts * mesh.expert
    tokens = SEQUENCES * LENGTH // mesh.devices
    visits = ROOM * tokens * config.model.moe.top_k
    return {
        "all-gather": 2 * layers + experts + ends,
        "all-reduce": layers + 2 * ends // mesh.fsdp,  # a device's own part of embedding and head, and on a CPU whole layers but experts
        "reduce-scatter": (experts + ends) // mesh.fsdp,
        "all-to-all": 4 * visits * WIDTH + 2 * tokens * WIDTH,  # experts: there and back, twice; embedding
        "collective-permute": 0,
    }


@pytest.fixture(scope="module")
def found():
    config = override(BASE, {**SHAPE, "mesh.fsdp": 2, "mesh.expert": 4})
    return config, list(exchanged(config, make_mesh(config.mesh)))


def test_devices_exchange_what_the_sharding_needs(found):
    config, collectives = found
    got = Counter()
    for kind, shapes in collectives:
        got[kind] += sum(map(math.prod, shapes))
    wanted = by_hand(config)
    for kind, numbers in wanted.items():
        assert got[kind] <= 1.3 * numbers, (kind, got[kind], numbers)
        assert got[kind] >= 0.7 * numbers, (kind, got[kind], numbers)  # nothing was missed in the text


def test_neither_streams_nor_the_whole_batch_nor_all_experts_are_gathered(found):
    _, collectives = found
    for kind, shapes in collectives:
        for shape in shapes:
            numbers = math.prod(shape)
            assert not (kind == "all-gather" and shape[:2] == (SEQUENCES, LENGTH)), shape
            assert not (kind == "all-gather" and numbers >= EXPERTS * WIDTH * HIDDEN and EXPERTS in shape), shape
