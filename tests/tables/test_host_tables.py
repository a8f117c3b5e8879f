"""Tables in host memory: the same training as on the device, rows in the right order of steps, and rows that stay on the device."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from table_cases import HEAD_DIM, NUM_ROWS, batch, on, placed, placed_table

from mhc_jax.errors import UserError
from mhc_jax.tables.gradients import RowGradients
from mhc_jax.tables.host import HostTable, _room
from mhc_jax.tables.host_device import HostBatch, HotRows, collect_host, read_host
from mhc_jax.tables.host_optimizers import host_optimizer
from mhc_jax.tables.lookup import collect, lookup

RATE = 0.05
NAMES = ["adam", "row_second_moment"]
STREAM = [batch("zipf", seed=seed)[0] for seed in range(6)]
WEIGHTS = np.random.default_rng(9).standard_normal((*STREAM[0].shape, HEAD_DIM)).astype(np.float32)


def loss(values, weights):
    return jnp.square(jnp.tanh(values * weights) - 0.5).mean()


def optimizer(name):
    return host_optimizer(name, beta1=0.9, beta2=0.95, eps=1e-20)


def start():
    return np.array(placed_table())[:NUM_ROWS]


def on_device(name):
    """Losses and the table after training on one device, without a host table."""
    of_table = optimizer(name).device

    @jax.jit
    def step(table, state, rows):
        values, _ = lookup(table, rows, num_rows=NUM_ROWS)
        value, grads = jax.value_and_grad(loss)(values, WEIGHTS)
        gradients, _ = collect(rows, grads, num_rows=NUM_ROWS)
        return value, *of_table.update(gradients, state, table, RATE)

    losses, table = [], jnp.asarray(start())
    state = of_table.init(table)
    for rows in STREAM:
        value, table, state = step(table, state, rows)
        losses.append(float(value))
    return np.array(losses), np.asarray(table)


def from_host(name, hot_rows=0, ahead=True, change_after=None, shards=1):
    """The same by a host table, with the next batch's rows gathered before this step's update or after it."""
    table = HostTable(start(), optimizer(name), hot_rows=hot_rows, shards=shards)
    of_hot = table.optimizer.device

    @jax.jit
    def step(hot, batch, weights):
        values, _ = read_host(hot, batch, hot_rows=hot_rows)
        value, grads = jax.value_and_grad(loss)(values, weights)
        gradients, of_cold = collect_host(batch, grads, hot_rows=hot_rows)
        return value, HotRows(*of_hot.update(gradients, hot.state, hot.table, RATE)) if hot_rows else hot, of_cold

    def put_hot(hot):
        return jax.tree.map(lambda x: placed(x, *("table_rows", None)[: x.ndim]), hot)

    losses, hot, handle = [], put_hot(table.hot()), table.prefetch(STREAM[0])
    for number, following in enumerate([*STREAM[1:], None]):
        taken = table.take(handle)
        split = HostBatch(placed(taken.cold, "table_rows"), placed(taken.index, "batch"))
        value, hot, of_cold = step(hot, split, placed(WEIGHTS, "batch"))
        if ahead and following is not None:
            handle = table.prefetch(following)
            handle.future.result()  # read before the update, as far ahead as can be
        table.apply(of_cold, RATE)
        if number == change_after:
            hot = put_hot(table.choose_hot(hot))
        if not ahead and following is not None:
            handle = table.prefetch(following)
        losses.append(float(value))
    table.settle(hot)
    table.close()
    return np.array(losses), table


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("hot_rows", "change_after"), [(0, None), (50, None), (50, 2), (NUM_ROWS, None)])
def test_losses_and_table_are_those_of_a_table_on_the_device(name, hot_rows, change_after):
    """Rounding apart: two roundings of a loss, and of a table entry as many as there were steps, of updates as large as the rate."""
    wanted, table = on_device(name)
    losses, host = from_host(name, hot_rows, change_after=change_after)
    assert len(set(wanted)) == len(wanted)
    np.testing.assert_allclose(losses, wanted, rtol=2e-6)
    np.testing.assert_allclose(host.table, table, rtol=0, atol=len(STREAM) * RATE * 2e-5)
    if change_after is not None:
        chosen = host._hot
        assert len(chosen) == hot_rows
        rest = np.setdiff1d(np.arange(NUM_ROWS), chosen)
        counted = np.bincount(np.concatenate(STREAM[: change_after + 2]).reshape(-1), minlength=NUM_ROWS)
        assert counted[chosen].min() >= counted[rest].max()


@pytest.mark.parametrize("name", NAMES)
def test_eight_devices_read_a_host_table_as_one_does(name):
    wanted, table = on_device(name)
    with on((2, 4)):
        losses, host = from_host(name, hot_rows=50, change_after=1, shards=8)
    np.testing.assert_allclose(losses, wanted, rtol=2e-6)
    np.testing.assert_allclose(host.table, table, rtol=0, atol=len(STREAM) * RATE * 2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_gathering_ahead_changes_no_bit(name):
    ahead, waited = (from_host(name, hot_rows=20, ahead=ahead) for ahead in (True, False))
    np.testing.assert_array_equal(ahead[0], waited[0])
    np.testing.assert_array_equal(ahead[1].table, waited[1].table)


def test_an_update_made_while_rows_are_gathered_is_seen(monkeypatch):
    """The gathering thread has read the old row when the update is made."""
    table = HostTable(np.zeros((8, 2), np.float32), optimizer("row_second_moment"))
    reading, updated, take = threading.Event(), threading.Event(), np.take

    def slow_take(array, *args, **options):
        found = take(array, *args, **options)
        if array is table.table:
            reading.set()
            assert updated.wait(10)
        return found

    first = table.prefetch(np.array([1, 5], np.int32))
    table.take(first)
    monkeypatch.setattr(np, "take", slow_take)
    second = table.prefetch(np.array([[5, 6, 5]], np.int32))
    assert reading.wait(10)
    table.apply(RowGradients(np.array([0, 1, 256]), np.array([[1, 1], [2, -2], [0, 0]], np.float32)), 0.5)
    updated.set()
    batch = table.take(second)
    np.testing.assert_array_equal(batch.cold[batch.index[0]], [[-0.5, 0.5], [0, 0], [-0.5, 0.5]])
    np.testing.assert_array_equal(table.table[[1, 5]], [[-0.5, -0.5], [-0.5, 0.5]])


def test_batches_two_ahead_see_every_update():
    """With two handles open; the record of changed rows does not grow."""
    rng, table = np.random.default_rng(0), HostTable(np.zeros((40, 2), np.float32), optimizer("row_second_moment"))
    rows = [rng.integers(0, 40, 30).astype(np.int32) for _ in range(12)]
    handles, longest = [table.prefetch(rows[0]), table.prefetch(rows[1])], 0
    for number in range(12):
        batch = table.take(handles[number])
        np.testing.assert_array_equal(batch.cold[batch.index], table.table[rows[number]])
        if number + 2 < 12:
            handles.append(table.prefetch(rows[number + 2]))
        places = np.unique(batch.index)
        values = rng.standard_normal((len(places), 2)).astype(np.float32)
        table.apply(RowGradients(places, values) if number % 5 else None, 0.1)
        longest = max(longest, len(table._log))
    assert longest <= 3
    assert table.table.any()


def test_the_order_of_calls_is_kept():
    table = HostTable(np.zeros((8, 2), np.float32), optimizer("adam"), hot_rows=2)
    with pytest.raises(RuntimeError, match="call take first"):
        table.apply(None, 0.1)
    first, second, third = (table.prefetch(np.array([row])) for row in (1, 2, 3))
    with pytest.raises(RuntimeError, match="in the order of their prefetch"):
        table.take(second)
    table.take(first)
    with pytest.raises(RuntimeError, match="were not applied"):
        table.take(second)
    with pytest.raises(RuntimeError, match="call apply first"):
        table.choose_hot(table.hot())
    table.apply(None, 0.1)
    table.take(second)
    assert table.state.updates == 0
    table.apply(None, 0.1)
    table.take(third)


def test_numbers_of_no_row_are_nan_and_not_counted():
    table = HostTable(start(), optimizer("adam"), hot_rows=5)
    rows = np.array([[3, -1], [NUM_ROWS, 100]], np.int32)
    batch = table.take(table.prefetch(rows))
    values, _ = read_host(jax.tree.map(jnp.asarray, table.hot()), batch, hot_rows=5)
    np.testing.assert_array_equal(np.isnan(values).all(axis=-1), [[False, True], [True, False]])
    np.testing.assert_array_equal(np.asarray(values)[[0, 1], [0, 1]], table.table[[3, 100]])
    assert table.uses.sum() == 2


def test_counted_rows_become_hot_and_reading_counts_nothing():
    table = HostTable(start(), optimizer("adam"), hot_rows=2)
    table.count(np.array([[7, 3, 7], [-1, 7, NUM_ROWS], [3, 5, 5]]))
    read = table.read(np.array([[5, 9], [9, 9]]))
    np.testing.assert_array_equal(read.cold[read.index - 2], table.table[[[5, 9], [9, 9]]])
    hot = table.choose_hot(table.hot())
    assert table._hot.tolist() in ([3, 7], [5, 7])
    np.testing.assert_array_equal(hot.table, table.table[table._hot])
    assert table.uses.sum() == 7


def test_the_step_meets_few_sizes():
    sizes = {_room(rows) for rows in range(1, 100_000)}
    assert all(_room(rows) >= rows for rows in range(1, 100_000, 7))
    assert all(_room(rows) <= 1.5 * rows for rows in range(400, 100_000, 7))
    assert len(sizes) < 20


def test_what_a_host_table_cannot_do_is_refused():
    with pytest.raises(UserError, match="the optimizer sinkhorn does not work for tables in host memory; adam and row_second_moment do"):
        host_optimizer("sinkhorn", beta1=0.9, beta2=0.95, eps=1e-20)
    with pytest.raises(UserError, match="hot_rows is 9; the table has 8 rows"):
        HostTable(np.zeros((8, 2), np.float32), optimizer("adam"), hot_rows=9)
    with pytest.raises(ValueError, match=r"the table is float64\[8, 2\]; it must be float32"):
        HostTable(np.zeros((8, 2)), optimizer("adam"))
