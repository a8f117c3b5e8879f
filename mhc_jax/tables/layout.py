"""How a table lies in memory: rows in contiguous blocks, one a shard, the last ones padding. What is done with rows is elsewhere."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from mhc_jax.parallel.rules import Rules


def padded_rows(num_rows: int, shards: int) -> int:
    """The least multiple of `shards` that holds `num_rows` rows."""
    return -(-num_rows // shards) * shards


def table_axes(rules: Rules) -> tuple[str, ...]:
    """Names of the mesh axes that rows are split over under the mesh set by `jax.set_mesh`; none without a mesh or with one device.

    Raises:
      ValueError: tables and batches are split over different axes. The exchange of rows runs over all devices that have tokens.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return ()
    if rules.table_rows != rules.batch:
        raise ValueError(f"table_rows is split over {rules.table_rows}, but batch over {rules.batch}; both must be split in the same way")
    axes = rules.table_rows
    return (axes,) if isinstance(axes, str) else axes or ()


def shard_count(rules: Rules) -> int:
    """In how many blocks the rows of a table are split under the mesh that is set."""
    mesh = jax.sharding.get_abstract_mesh()
    count = 1
    for axis in table_axes(rules):
        count *= mesh.shape[axis]
    return count


def initial_table(key: PRNGKeyArray, num_rows: int, padded: int, head_dim: int, std: float) -> Float[Array, "padded head_dim"]:
    """A float32 table [padded, head_dim] of normal numbers with the given standard deviation; rows from `num_rows` on are zero.

    A row's values do not depend on the padding: JAX numbers random elements from the first on.
    """
    values = std * jax.random.normal(key, (padded, head_dim), jnp.float32)
    return jnp.where(jnp.arange(padded)[:, None] < num_rows, values, 0.0)
