"""What every optimizer of a table keeps to, and each against its own dense oracle."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import table_oracles as oracles
from table_cases import HEAD_DIM, MESHES, NUM_ROWS, batch, on, placed, placed_table

from mhc_jax.tables import sinkhorn
from mhc_jax.tables.gradients import RowGradients
from mhc_jax.tables.lookup import collect
from mhc_jax.tables.optimizers import row_adam, row_second_moment
from mhc_jax.tables.sinkhorn import sinkhorn_momentum


class Case(NamedTuple):
    make: object  # number of rows -> TableOptimizer
    oracle: type
    lazy: bool  # whether rows that are not touched stay


OPTIMIZERS = {
    "row_adam": Case(lambda num_rows: row_adam(), oracles.Adam, lazy=True),
    "row_second_moment": Case(lambda num_rows: row_second_moment(), oracles.SecondMoment, lazy=True),
    "sinkhorn_momentum": Case(sinkhorn_momentum, oracles.Sinkhorn, lazy=False),
}
every = pytest.mark.parametrize("name", OPTIMIZERS)
RATE = 0.03


def steps(name, batches, rate=RATE):
    """Table and state after these batches, under the mesh that is set."""
    optimizer = OPTIMIZERS[name].make(NUM_ROWS)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(table, state, rows, values):
        gradients, _ = collect(rows, values, num_rows=NUM_ROWS)
        return optimizer.update(gradients, state, table, rate)

    table = placed_table()
    state = jax.jit(optimizer.init)(table)
    for rows, values in batches:
        table, state = step(table, state, placed(rows, "batch"), placed(values, "batch"))
    return table, state


def oracle_steps(name, batches, dtype):
    table = np.asarray(placed_table()).astype(dtype)
    optimizer = OPTIMIZERS[name].oracle(table, dtype)
    for rows, values in batches:
        grad, touched = oracles.dense_gradient(rows, values, NUM_ROWS, dtype)
        optimizer.step(table, grad, touched, dtype(RATE))
    return table


BATCHES = [batch("zipf", seed=1), batch("one owner", seed=2), batch("zipf", seed=3)]


@every
@pytest.mark.parametrize("mesh", [m if m in (None, (2, 4)) else pytest.param(m, marks=pytest.mark.slow) for m in MESHES])
def test_three_steps_are_those_of_the_dense_oracle(name, mesh):
    """Within a few times what float32 costs the oracle itself. Lazy: the rows of no batch stay, bit for bit. Padding stays zero."""
    with on(mesh):
        start = np.asarray(placed_table())
        table = np.asarray(steps(name, BATCHES)[0])
    truth = oracle_steps(name, BATCHES, np.float64)
    due = np.abs(oracle_steps(name, BATCHES, np.float32) - truth).max()
    assert np.abs(table[:NUM_ROWS] - truth).max() <= 6 * due < 1e-4
    assert not table[NUM_ROWS:].any()
    touched = np.isin(np.arange(NUM_ROWS), np.concatenate([rows.reshape(-1) for rows, _ in BATCHES]))
    moved = (table != start).any(axis=1)[:NUM_ROWS]
    assert 0 < touched.sum() < NUM_ROWS
    np.testing.assert_array_equal(moved, touched)


def test_sinkhorn_moves_rows_by_their_momentum_after_their_last_touch_in_blocks_of_any_size(monkeypatch):
    """With blocks that do not divide the rows; and the last step's untouched rows move."""
    batches = [*BATCHES, batch("one row")]
    monkeypatch.setattr(sinkhorn, "BLOCK_ROWS", 50)
    before, _ = steps("sinkhorn_momentum", BATCHES)
    table, _ = steps("sinkhorn_momentum", batches)
    truth = oracle_steps("sinkhorn_momentum", batches, np.float64)
    due = np.abs(oracle_steps("sinkhorn_momentum", batches, np.float32) - truth).max()
    assert np.abs(table - truth).max() <= 6 * due < 1e-4
    assert (before != table).any(axis=1).sum() > 100


def test_sinkhorn_passes_over_rows_far_below_the_mean_and_balances_the_others():
    """Rows and columns of the direction have equal lengths, those of the rows exactly; tiny gradients are no smaller a step."""
    num_rows, optimizer = 400, sinkhorn_momentum(400, tau=1e-3)
    rng = np.random.default_rng(0)
    values = (1e-21 * rng.standard_normal((400, 8)) * 10.0 ** rng.uniform(-1, 1, (400, 1))).astype(np.float32)
    values[100:150] *= 1e-6
    table = jnp.zeros((num_rows, 8))
    gradients = RowGradients(jnp.arange(num_rows, dtype=jnp.int32), jnp.asarray(values))
    table, _ = jax.jit(optimizer.update)(gradients, optimizer.init(table), table, 1 / 0.18)
    assert not table[100:150].any()
    direction = np.delete(np.asarray(table, np.float64), np.s_[100:150], axis=0)
    np.testing.assert_allclose(np.sqrt((direction**2).mean(axis=1)), 1.0, rtol=1e-5)
    np.testing.assert_allclose(np.sqrt((direction**2).mean(axis=0)), 1.0, rtol=0.01)
    with pytest.raises(ValueError, match="passes is 10; it must be odd"):
        sinkhorn_momentum(400, passes=10)


@pytest.mark.slow
@every
def test_two_runs_have_the_same_bits(name):
    with on((2, 4)):
        first, second = steps(name, BATCHES), steps(name, BATCHES)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second)):
        np.testing.assert_array_equal(a, b)


@every
def test_room_that_no_row_fills_changes_nothing(name):
    """The same rows among more places for rows give the same bits, and no rows leave a fresh table as it is."""
    optimizer, table = OPTIMIZERS[name].make(NUM_ROWS), placed_table()
    rows = jnp.array([3, 8, 90, *[NUM_ROWS] * 5], jnp.int32)
    values = jnp.asarray(np.random.default_rng(0).standard_normal((8, HEAD_DIM)), jnp.float32) * (rows < NUM_ROWS)[:, None]
    few, many = (optimizer.update(RowGradients(rows[:n], values[:n]), optimizer.init(table), table, RATE) for n in (3, 8))
    for a, b in zip(jax.tree.leaves(few), jax.tree.leaves(many)):
        np.testing.assert_array_equal(a, b)
    still, _ = optimizer.update(RowGradients(rows[3:], values[3:]), optimizer.init(table), table, RATE)
    np.testing.assert_array_equal(still, table)


@every
def test_the_step_is_in_proportion_to_the_learning_rate(name):
    start, one, five = placed_table(), *(steps(name, BATCHES[:1], rate)[0] for rate in (RATE, 5 * RATE))
    np.testing.assert_allclose(five - start, 5 * (one - start), rtol=0, atol=1e-6)
    assert jnp.abs(one - start).max() > RATE / 20


@pytest.mark.parametrize("name", ["row_adam", "row_second_moment"])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-19, 1e-16])
def test_a_gradient_however_small_is_no_step_of_many_learning_rates(name, size):
    values = jnp.full((3, HEAD_DIM), size, jnp.float32)
    gradients, start = RowGradients(jnp.arange(3, dtype=jnp.int32), values), placed_table()
    optimizer = OPTIMIZERS[name].make(NUM_ROWS)
    table, _ = optimizer.update(gradients, optimizer.init(start), start, RATE)
    moved = jnp.abs(table - start)[:3]
    assert (moved < 1.5 * RATE).all()
    assert (moved > 0.5 * RATE).all() == (size == 1e-16)


@every
def test_state_is_split_as_partition_says(name):
    with on((2, 4)):
        table, state = steps(name, BATCHES[:1])
        assert table.addressable_shards[0].data.shape == (42, HEAD_DIM)
        specs = OPTIMIZERS[name].make(NUM_ROWS).partition()
        assert jax.tree.structure(specs) == jax.tree.structure(state)
        for spec, leaf in zip(jax.tree.leaves(specs), jax.tree.leaves(state)):
            assert leaf.sharding.is_equivalent_to(jax.NamedSharding(jax.sharding.get_mesh(), spec), leaf.ndim)


@every
@pytest.mark.parametrize("branch", [False, True])
@pytest.mark.parametrize("devices", [1, 8])
def test_an_update_is_in_place(name, branch, devices):
    """Temporaries have the same size for a table a hundred times as large, also where the update stands in a branch."""

    def temporaries(num_rows):
        optimizer = OPTIMIZERS[name].make(num_rows)

        def step(table, state, gradients, rate, good):
            update = lambda table, state: optimizer.update(gradients, state, table, rate)  # noqa: E731
            return jax.lax.cond(good, update, lambda *old: old, table, state) if branch else update(table, state)

        table = shaped((num_rows, 4), jnp.float32, optimizer_rows)
        state = jax.eval_shape(optimizer.init, table)
        state = jax.tree.map(lambda x, spec: shaped(x.shape, x.dtype, spec), state, optimizer.partition())
        gradients = RowGradients(shaped((64,), jnp.int32, optimizer_rows), shaped((64, 4), jnp.float32, optimizer_rows))
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(table, state, gradients, jnp.float32(0.1), True).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    optimizer_rows = jax.P(("data", "fsdp"))
    with on(None if devices == 1 else (2, 4)):
        mesh = jax.sharding.get_mesh()

        def shaped(shape, dtype, spec):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=None if mesh.empty else jax.NamedSharding(mesh, spec))

        small, large = temporaries(10**5), temporaries(10**7)
    assert small == large < 10**6
