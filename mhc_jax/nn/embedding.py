"""Rows of the embedding for tokens, on a mesh without ever moving more than what the tokens read."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mhc_jax.parallel.rules import Rules
from mhc_jax.parallel.shards import axes_here, on_shards, shard_count


def embed(table: Float[Array, "V C"], tokens: Int[Array, "B S"], dtype: jnp.dtype, rules: Rules) -> Float[Array, "B S C"]:
    """The tokens' rows in `dtype`.

    A device has some columns of some rows. Those that share a table tell each other their tokens, and send what they have of the rows. The
    gradient takes the same way back and is summed where the rows are, in the table's type. Left to the partitioner, every device would sum
    the gradients of all tokens of the batch.
    """
    columns, rows = axes_here(rules, "embed"), axes_here(rules, "vocab")
    axes = (*columns, *rows)

    def local(table: Array, tokens: Array) -> Array:
        if not axes:
            return table[tokens].astype(dtype)
        asked = jax.lax.all_gather(tokens, axes)  # [devices that share the table, B, S]
        if rows:
            asked = asked - jax.lax.axis_index(rows) * table.shape[0]
        there = (asked >= 0) & (asked < table.shape[0])
        found = table.at[jnp.where(there, asked, table.shape[0])].get(mode="fill", fill_value=0).astype(dtype)
        came = jax.lax.all_to_all(found, axes, split_axis=0, concat_axis=0, tiled=True)
        # The barrier is for the way back: XLA:CPU simplifies one operand of its all-to-all there, and then refuses the program.
        came = jax.lax.optimization_barrier(came)
        parts = came.reshape(shard_count(rules, "embed"), shard_count(rules, "vocab"), *came.shape[1:]).sum(
            axis=1
        )  # one device of each column has the row
        return jnp.moveaxis(parts, 0, -2).reshape(*tokens.shape, -1)

    where = ("batch", "sequence")
    return on_shards(local, rules, given=(("vocab", "embed"), where), results=(*where, None))(table, tokens)
