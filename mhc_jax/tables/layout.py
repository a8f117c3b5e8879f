"""How a table lies in memory: rows in contiguous blocks, one a shard, the last ones padding. What is done with rows is elsewhere."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from mhc_jax.parallel.rules import Rules
from mhc_jax.parallel.shards import shard_count


def padded_rows(num_rows: int, shards: int) -> int:
    """The least multiple of `shards` that holds `num_rows` rows."""
    return -(-num_rows // shards) * shards


def table_axes(rules: Rules) -> tuple[str, ...]:
    """Names of the mesh axes that rows are split over under the mesh set by `jax.set_mesh`; none without a mesh or with one device.

    Raises:
      ValueError: tables and tokens are split over different axes. The exchange of rows runs over all devices that have tokens.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return ()
    if rules.table_rows != rules.tokens:
        raise ValueError(f"table_rows is split over {rules.table_rows}, but tokens over {rules.tokens}; both must be split in the same way")
    return rules.mesh_axes("table_rows")


def table_shards(rules: Rules) -> int:
    """In how many blocks the rows of a table are split under the mesh that is set."""
    return shard_count(rules, "table_rows") if table_axes(rules) else 1


def initial_table(key: PRNGKeyArray, num_rows: int, padded: int, head_dim: int, std: float) -> Float[Array, "padded head_dim"]:
    """A float32 table [padded, head_dim] of normal numbers with the given standard deviation; rows from `num_rows` on are zero.

    A row's values do not depend on the padding: JAX numbers random elements from the first on.
    """
    values = std * jax.random.normal(key, (padded, head_dim), jnp.float32)
    return jnp.where(jnp.arange(padded)[:, None] < num_rows, values, 0.0)
