"""Engram's tables in a training step: the same whatever the microbatches and devices; rows that no token read stay as they are."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from small import only, slowly

from mhc_jax.config import override
from mhc_jax.engram_config import EngramConfig, TableConfig
from mhc_jax.engram_layout import table_rows
from mhc_jax.parallel.mesh import make_mesh
from mhc_jax.parallel.rules import Rules
from mhc_jax.train.step import initial_state, placed_initial_state, train_step

RULES = Rules()
OPTIMIZERS = ("adam", "row_second_moment", "sinkhorn")


def config_of(tiny, optimizer="adam", **changes):
    engram = EngramConfig(layers=(1,), table_sizes=(101, 211), heads=2, head_dim=4, tables=TableConfig(optimizer))
    return override(tiny, {"model.engram": engram, "model.residual": "residual", "optimizer.clip_norm": 0.1, **changes})


def batch_of(config, seed=0):
    rng = np.random.default_rng(seed)
    shape = (config.train.batch_size, config.data.seq_len)
    tokens = rng.integers(0, config.model.vocab_size, shape)
    (rows,) = table_rows(config.model.engram)
    arrays = {
        "tokens": tokens,
        "targets": np.where(np.arange(shape[1]) < rng.integers(1, shape[1], (shape[0], 1)), np.roll(tokens, -1, axis=1), -1),
        "positions": np.broadcast_to(np.arange(shape[1]), shape),
        "segment_ids": np.ones(shape),
        "engram_rows": rng.integers(0, rows // 2, (*shape, 1, config.model.engram.all_heads)) * 2,  # odd rows are never read
    }
    return {name: jnp.asarray(x, jnp.int32) for name, x in arrays.items()}


@cache
def step_of(config):
    return jax.jit(partial(train_step, config=config, rules=RULES))


def trained(config, steps=3):
    """Losses and the last state, with the tables as they would be saved: without padding."""
    mesh = make_mesh(config.mesh)
    losses = []
    with jax.set_mesh(mesh):
        state = placed_initial_state(config, mesh, RULES)
        step = step_of(config)
        for seed in range(steps):
            state, metrics = step(state, jax.device_put(batch_of(config, seed), NamedSharding(mesh, RULES.spec("batch"))))
            losses.append(float(metrics.loss))
    return losses, state


@cache
def alone(config):
    return trained(config)


@cache
def start(config):
    return trained(config, 0)[1]


def same(got, config, bound):
    losses, state = got
    wanted_losses, wanted = alone(config)
    assert losses == pytest.approx(wanted_losses, rel=1e-5)
    rows = table_rows(config.model.engram)[0]
    before = np.asarray(start(config).memory.tables[0])
    moved, wanted_moved = (np.asarray(s.memory.tables[0])[:rows] - before[:rows] for s in (state, wanted))
    assert np.abs(wanted_moved).max() > 0
    assert np.abs(moved - wanted_moved).max() < bound * np.abs(wanted_moved).max()


# The fast suite compares eight devices with one in tests/tables; here whole steps are run.
@pytest.mark.parametrize("optimizer", slowly(["adam"], OPTIMIZERS))
def test_eight_devices_move_tables_as_one(tiny, optimizer):
    config = config_of(tiny, optimizer)
    got = trained(override(config, {"mesh.data": 2, "mesh.fsdp": 4}))
    same(got, config, 1e-3)
    table = got[1].memory.tables[0]
    assert {shard.data.shape[0] for shard in table.addressable_shards} == {table.shape[0] // 8}


@pytest.mark.slow
def test_microbatches_move_tables_as_the_whole_batch_does(tiny):
    config = config_of(tiny)
    same(trained(override(config, {"train.microbatches": 4})), config, 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", only(["adam"], ["adam", "row_second_moment"]))
def test_rows_that_no_token_read_stay(tiny, optimizer):
    config = config_of(tiny, optimizer)
    before, (_, after) = start(config), alone(config)
    moved = np.any(np.asarray(before.memory.tables[0]) != np.asarray(after.memory.tables[0]), axis=1)
    read = {int(row) for seed in range(3) for row in np.asarray(batch_of(config, seed)["engram_rows"]).reshape(-1)}
    assert set(np.flatnonzero(moved)) <= read
    assert moved.sum() > 0.5 * len(read)


def test_a_step_that_is_skipped_leaves_tables_alone(tiny):
    config = config_of(tiny)
    state, mesh = start(config), make_mesh(config.mesh)
    bad = state._replace(model=jax.tree.map(lambda p: p * jnp.nan, state.model))
    with jax.set_mesh(mesh):
        new, metrics = step_of(config)(bad, jax.device_put(batch_of(config), NamedSharding(mesh, RULES.spec("batch"))))
    assert float(metrics.skipped) == 1
    for a, b in zip(jax.tree.leaves(new.memory), jax.tree.leaves(state.memory)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_no_array_of_the_step_is_as_large_as_the_table_but_the_table_and_its_moments(tiny):
    """By the compiler's count: with a table ten times as long the step needs no byte more beside its arguments."""

    def temporaries(size: int) -> int:
        config = config_of(tiny)
        engram = dataclasses.replace(config.model.engram, table_sizes=(size, size))
        config = override(config, {"model.engram": engram})
        state = jax.eval_shape(lambda: initial_state(config))
        step = jax.jit(partial(train_step, config=config, rules=RULES), donate_argnums=0)
        return step.lower(state, batch_of(config)).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(1_000_000) == temporaries(100_000)
