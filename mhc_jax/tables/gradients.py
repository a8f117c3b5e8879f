"""Gradients of some rows of a table, and sums over equal rows in an order that does not change from run to run. No mesh here."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class RowGradients(NamedTuple):
    """The gradient of a table where it is not zero.

    On a mesh both arrays are split as the table is: every shard holds the rows that it owns.
    """

    rows: Int[Array, " M"]  # int32; in each shard rising and without repetition, then `padded` (no row's number) up to the end
    values: Float[Array, "M head_dim"]  # float32, summed over everything that read the row; zero after the last row


class Distinct(NamedTuple):
    """The distinct numbers of a list, and where each element of the list finds its own."""

    rows: Int[Array, " N"]  # rising, then `absent` up to the end
    order: Int[Array, " N"]  # sorts the list, equal numbers in the order in which they stood
    position: Int[Array, " N"]  # of every sorted element: the index of its number in `rows`
    first: Bool[Array, " N"]  # of every sorted element: whether the one before it is another number


def distinct(rows: Int[Array, " N"], absent: int) -> Distinct:
    """Sorts a list of numbers up to `absent`, which stands for no number and is larger than any."""
    ordered, order = jax.lax.sort((rows, jnp.arange(rows.size, dtype=jnp.int32)), num_keys=1, is_stable=True)
    first = jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])
    position = jnp.cumsum(first, dtype=jnp.int32) - 1
    unique = jnp.full(rows.size, absent, jnp.int32).at[position].set(ordered)
    return Distinct(unique, order, position, first)


def sum_equal(found: Distinct, values: Float[Array, "N head_dim"], absent: int) -> Float[Array, "N head_dim"]:
    """Sums of the values of equal numbers, in the places of `found.rows`; zero in the places of `absent`.

    The sum is a scan over the sorted values that begins anew at each number: a tree, so that the rounding error of a row which everything
    reads grows with the logarithm of their number, and the same bits on every run, which adding by scatter does not give on a GPU.
    """

    def add(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        return left[0] | right[0], jnp.where(right[0], right[1], left[1] + right[1])

    ordered = values.astype(jnp.float32)[found.order]
    _, sums = jax.lax.associative_scan(add, (found.first[:, None], ordered))
    last = jnp.concatenate([found.first[1:], jnp.ones(1, bool)])
    # The sum of a number stands at its last element. All other elements get a place after the end, and are dropped.
    place = jnp.where(last, found.position, found.position.size)
    summed = jnp.zeros_like(ordered).at[place].set(sums, mode="drop")
    return jnp.where((found.rows < absent)[:, None], summed, 0.0)
