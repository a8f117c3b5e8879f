"""Rows by number and their gradients, on one device and over the exchange, against dense NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from table_cases import HEAD_DIM, MESHES, NUM_ROWS, batch, dense, on, placed, placed_table
from table_oracles import dense_gradient

from mhc_jax.parallel.rules import Rules
from mhc_jax.tables.layout import initial_table, padded_rows
from mhc_jax.tables.lookup import collect, lookup

KINDS = ["zipf", "even", "one row", "one owner", "ranges"]
CASES = [pytest.param(mesh, kind, marks=[] if mesh == (2, 4) or kind == "zipf" else pytest.mark.slow) for mesh in MESHES for kind in KINDS]


def read(table, rows, **options):
    return jax.jit(partial(lookup, num_rows=NUM_ROWS, **options))(table, rows)


def gathered(rows, values, **options):
    return jax.jit(partial(collect, num_rows=NUM_ROWS, **options))(rows, values)


@pytest.mark.parametrize(("mesh", "kind"), CASES)
def test_rows_are_those_of_the_table_bit_for_bit(mesh, kind):
    rows, _ = batch(kind)
    with on(mesh):
        table = placed_table()
        values, stats = read(table, placed(rows, "batch"))
    np.testing.assert_array_equal(values, np.asarray(table)[rows])
    assert stats.invalid == 0
    assert (stats.rounds > 0) == (mesh is not None)


@pytest.mark.parametrize(("mesh", "kind"), CASES)
def test_gradients_are_sums_over_equal_rows(mesh, kind):
    """Within what adding n numbers in a tree can lose: log2(n) roundings of the sum of magnitudes."""
    rows, values = batch(kind)
    with on(mesh):
        gradients, stats = gathered(placed(rows, "batch"), placed(values, "batch"))
    wanted, touched = dense_gradient(rows, values, NUM_ROWS)
    magnitude, _ = dense_gradient(rows, np.abs(values), NUM_ROWS)
    assert (np.abs(dense(gradients) - wanted) <= np.log2(2 * rows.size) * 2.0**-24 * magnitude).all()
    found = np.asarray(gradients.rows)
    assert set(found[found < NUM_ROWS]) == set(np.flatnonzero(touched))
    assert stats.invalid == 0
    for shard in found.reshape(1 if mesh is None else mesh[0] * mesh[1], -1):
        assert (np.diff(shard) >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_rounds_too_small_for_their_rows_change_no_bit(kind):
    rows, values = batch(kind)
    results = []
    with on((2, 4)):
        table, rows, values = placed_table(), placed(rows, "batch"), placed(values, "batch")
        for capacity in (8.0, 0.2, 0.01):
            one, there = read(table, rows, capacity=capacity)
            other, back = gathered(rows, values, capacity=capacity)
            results.append((one, *other))
            assert there.overflow == back.overflow
            assert (there.overflow > 0) == (there.rounds > 1)
            assert back.rounds >= there.rounds
    assert there.overflow > 0 or kind == "one row"
    for later in results[1:]:
        for a, b in zip(results[0], later):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("mesh", [None, (2, 4)])
def test_two_runs_have_the_same_bits(mesh):
    rows, values = batch("zipf")
    with on(mesh):
        rows, values = placed(rows, "batch"), placed(values, "batch")
        run = jax.jit(partial(collect, num_rows=NUM_ROWS))
        first, second = run(rows, values)[0], run(rows, values)[0]
    np.testing.assert_array_equal(first.rows, second.rows)
    np.testing.assert_array_equal(first.values, second.values)


@pytest.mark.parametrize("mesh", [None, (2, 4)])
def test_numbers_of_no_row_are_nan_counted_and_have_no_gradient(mesh):
    """Also those of padding, and those that would be rows if counted from the end."""
    rows, values = batch("even")
    rows[3, 2, 1], rows[9, 0, 0], rows[20, 4, 2], rows[23] = -1, NUM_ROWS, 2**31 - 1, -(2**31)
    wrong = (rows < 0) | (rows >= NUM_ROWS)
    with on(mesh):
        table = placed_table()
        read_values, stats = read(table, placed(rows, "batch"))
        gradients, back = gathered(placed(rows, "batch"), placed(values, "batch"))
    assert stats.invalid == back.invalid == wrong.sum() == 18
    np.testing.assert_array_equal(np.isnan(read_values).any(axis=-1), wrong)
    np.testing.assert_array_equal(np.asarray(read_values)[~wrong], np.asarray(table)[rows[~wrong]])
    np.testing.assert_allclose(dense(gradients), dense_gradient(rows, values, NUM_ROWS)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("mesh", [None, (2, 4)])
def test_gradients_of_microbatches_joined_are_those_of_the_batch(mesh):
    rows, values = batch("zipf", sequences=32)
    with on(mesh):
        whole, _ = gathered(placed(rows, "batch"), placed(values, "batch"))
        parts = [np.concatenate([x[m::4] for m in range(4)]) for x in (rows, values)]
        joined, _ = gathered(*(placed(part, "batch") for part in parts))
    np.testing.assert_array_equal(joined.rows, whole.rows)
    magnitude, _ = dense_gradient(rows, np.abs(values), NUM_ROWS)
    assert (np.abs(dense(joined) - dense(whole)) <= 2 * np.log2(2 * rows.size) * 2.0**-24 * magnitude).all()


def test_the_gradient_is_that_of_a_dense_gather_and_none_of_the_tables_size_is_made():
    rows, _ = batch("zipf")
    weights = jnp.asarray(np.random.default_rng(5).standard_normal((*rows.shape, HEAD_DIM)), jnp.float32)

    def loss(values):
        return (weights * jnp.tanh(values)).sum()

    def sparse(table, rows):
        values, _ = lookup(table, rows, num_rows=table.shape[0])
        return collect(rows, jax.grad(loss)(values), num_rows=table.shape[0])[0]

    table = placed_table()
    wanted = jax.grad(lambda table: loss(table[rows]))(table)
    np.testing.assert_allclose(dense(sparse(table, rows)), wanted, rtol=0, atol=1e-5)
    temporaries = [
        jax.jit(sparse).lower(jax.ShapeDtypeStruct((n, HEAD_DIM), jnp.float32), rows).compile().memory_analysis().temp_size_in_bytes
        for n in (10**5, 10**7)
    ]
    assert temporaries[0] == temporaries[1] < 10**6


def test_first_values_do_not_depend_on_padding():
    one, other = (initial_table(jax.random.key(3), 331, padded, 4, std=0.5) for padded in (331, 336))
    np.testing.assert_array_equal(one, other[:331])
    assert not other[331:].any()
    assert 0.45 < one.std() < 0.55
    assert [padded_rows(36_204_260, shards) % shards for shards in (1, 3, 8)] == [0, 0, 0]
    assert padded_rows(36_204_260, 8) == 36_204_264


def test_what_does_not_fit_is_refused():
    rows, values = batch()
    with pytest.raises(ValueError, match=r"values are \[24, 5, 3, 6\], but rows are \[12, 5, 3\]"):
        collect(rows[:12], values, num_rows=NUM_ROWS)
    with pytest.raises(ValueError, match="the table has 331 rows; 300 rows in 1 shards need 300"):
        lookup(placed_table(), rows, num_rows=300)
    with pytest.raises(ValueError, match="rows are float32; they must be integers"):
        lookup(placed_table(), rows.astype(np.float32), num_rows=NUM_ROWS)
    with pytest.raises(ValueError, match="at least one number"):
        lookup(placed_table(), rows[:0], num_rows=NUM_ROWS)
    with on((2, 4)):
        with pytest.raises(ValueError, match=r"rows are \[12, 5, 3\]; the batch axis must divide by the 8 devices"):
            lookup(placed_table(), rows[:12], num_rows=NUM_ROWS)
        with pytest.raises(ValueError, match=r"table_rows is split over fsdp, but tokens over \('data', 'fsdp'"):
            lookup(placed_table(), rows, num_rows=NUM_ROWS, rules=Rules(table_rows="fsdp"))
