"""Meshes, placed tables and batches of row numbers that the tests of tables share."""

import contextlib

import jax
import numpy as np
from jax.sharding import NamedSharding

from mhc_jax.config import MeshConfig
from mhc_jax.parallel.mesh import make_mesh
from mhc_jax.parallel.rules import Rules
from mhc_jax.tables.layout import initial_table, padded_rows, table_shards

NUM_ROWS, HEAD_DIM = 331, 6  # a prime: no number of shards divides it
MESHES = [None, (2, 4), (8, 1), (1, 3)]


@contextlib.contextmanager
def on(mesh):
    """Under a mesh of (data, fsdp) devices, or without one."""
    if mesh is None:
        yield
    else:
        with jax.set_mesh(make_mesh(MeshConfig(data=mesh[0], fsdp=mesh[1]))):
            yield


def placed(x, *axes):
    """The array, split as these logical axes are on the mesh that is set."""
    mesh = jax.sharding.get_mesh()
    return jax.numpy.asarray(x) if mesh.empty else jax.device_put(x, NamedSharding(mesh, Rules().spec(*axes)))


def placed_table(num_rows=NUM_ROWS, head_dim=HEAD_DIM):
    padded = padded_rows(num_rows, table_shards(Rules()))
    return placed(initial_table(jax.random.key(0), num_rows, padded, head_dim, std=0.1), "table_rows", None)


def batch(kind="zipf", sequences=24, seed=0, num_rows=NUM_ROWS, head_dim=HEAD_DIM):
    """Row numbers [sequences, 5, 3] and the gradients of the values read."""
    rng, shape = np.random.default_rng(seed), (sequences, 5, 3)
    rows = {
        "zipf": lambda: rng.zipf(1.2, shape) % num_rows,
        "even": lambda: rng.integers(0, num_rows, shape),
        "one row": lambda: np.full(shape, 200),
        "one owner": lambda: rng.integers(0, 40, shape),
        "ranges": lambda: np.sort(rng.integers(0, num_rows, shape).reshape(-1)).reshape(shape),  # devices read different ranges
    }[kind]()
    return rows.astype(np.int32), rng.standard_normal((*shape, head_dim)).astype(np.float32)


def dense(gradients, num_rows=NUM_ROWS):
    """The dense form of row gradients, after a check that no row stands twice."""
    rows, values = np.asarray(gradients.rows), np.asarray(gradients.values)
    there = rows < num_rows
    assert len(set(rows[there])) == there.sum()
    assert not values[~there].any()
    out = np.zeros((num_rows, values.shape[1]), values.dtype)
    out[rows[there]] = values[there]
    return out
