"""Rows and their gradients between the devices that read them and the devices that own them. Inside `shard_map`: every scatter is local.

Device s owns the rows [s * block, (s + 1) * block). A round is one all-to-all of fixed size; rounds follow until no device has anything
left. No partitioner places a gather or a scatter here: GSPMD's gradients of embeddings were wrong in several releases (openxla/xla issues
42481 and 49143). The way is that of Engram's training (arXiv 2601.07372, section 2.5): rows there, gradients back.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from mhc_jax.tables.gradients import Distinct, RowGradients, distinct, sum_equal
from mhc_jax.tables.layout import padded_rows

Axes = tuple[str, ...]


class LookupStats(NamedTuple):
    """What an exchange did, summed over devices; int32 scalars."""

    invalid: Int[Array, ""]  # numbers outside [0, num_rows)
    overflow: Int[Array, ""]  # distinct rows of all devices that did not fit in the first round; 0 on one device
    rounds: Int[Array, ""]  # all-to-alls that it took; 0 on one device


def valid(rows: Int[Array, "*shape"], num_rows: int, absent: int) -> Int[Array, "*shape"]:
    """The numbers as int32, with `absent` in the place of those outside [0, num_rows)."""
    return jnp.where((rows >= 0) & (rows < num_rows), rows, absent).astype(jnp.int32)


def lookup(
    table: Array, rows: Array, num_rows: int, where: PartitionSpec, axes: Axes, shards: int, capacity: float
) -> tuple[Array, LookupStats]:
    """`mhc_jax.tables.lookup.lookup` on a mesh whose `axes` have `shards` devices; the numbers lie as `where` says."""
    absent = padded_rows(num_rows, shards)

    def local(table: Array, rows: Array) -> tuple[Array, LookupStats]:
        numbers = valid(rows, num_rows, absent).reshape(-1)
        asked = _Asked(distinct(numbers, absent), absent, axes, shards, capacity)
        found = _fetch(table, asked)
        # Back through the sorting: the place of each number of the list.
        place = jnp.zeros(numbers.size, jnp.int32).at[asked.found.order].set(asked.found.position)
        values = jnp.where((numbers < absent)[:, None], found[0][place], jnp.nan)
        return values.reshape(*rows.shape, -1), asked.stats(numbers, found[1])

    return _on_shards(local, (PartitionSpec(axes), where), (where, PartitionSpec()))(table, rows)


def collect(
    rows: Array, values: Array, num_rows: int, where: PartitionSpec, axes: Axes, shards: int, capacity: float
) -> tuple[RowGradients, LookupStats]:
    """`mhc_jax.tables.lookup.collect` on a mesh whose `axes` have `shards` devices; numbers and values lie as `where` says."""
    absent = padded_rows(num_rows, shards)

    def local(rows: Array, values: Array) -> tuple[RowGradients, LookupStats]:
        numbers = valid(rows, num_rows, absent).reshape(-1)
        asked = _Asked(distinct(numbers, absent), absent, axes, shards, capacity)
        sums = sum_equal(asked.found, values.reshape(numbers.size, -1), absent)
        gradients, rounds = _send(sums, asked)
        return gradients, asked.stats(numbers, rounds)

    return _on_shards(local, (where, where), (PartitionSpec(axes), PartitionSpec()))(rows, values)


def _on_shards(f: Callable[..., Any], given: Any, results: Any) -> Callable[..., Any]:
    # Without the check of what varies over devices: it has no rule for a loop whose end all devices agree upon by a sum.
    return jax.shard_map(f, in_specs=given, out_specs=results, check_vma=False)


class _Asked:
    """One device's distinct rows, sorted and so in runs, one run an owner; and how they travel."""

    def __init__(self, found: Distinct, absent: int, axes: Axes, shards: int, capacity: float):
        self.found, self.absent, self.axes, self.shards = found, absent, axes, shards
        self.block = absent // shards
        asks = found.rows.size
        # No device asks another for more rows than it has numbers or than the other has rows.
        self.room = min(max(math.ceil(capacity * asks / shards), 1), asks, self.block)
        bounds = jnp.searchsorted(found.rows, jnp.arange(shards + 1, dtype=jnp.int32) * self.block).astype(jnp.int32)
        self.start, self.end = bounds[:-1], bounds[1:]

    def next(self, start: Int[Array, " shards"]) -> tuple[Int[Array, "shards room"], Bool[Array, "shards room"]]:
        """Places in `found.rows` of the next rows for every owner, and which of these there are."""
        places = start[:, None] + jnp.arange(self.room, dtype=jnp.int32)[None]
        return places, places < self.end[:, None]

    def exchanged(self, x: Array) -> Array:
        """Row o of `x` goes to device o; row s of the result comes from device s."""
        return jax.lax.all_to_all(x, self.axes, split_axis=0, concat_axis=0, tiled=True)

    def left(self, start: Int[Array, " shards"]) -> Int[Array, ""]:
        """How many rows of all devices have not been dealt with."""
        return jax.lax.psum((self.end - start).sum(), self.axes)

    def own(self) -> Int[Array, ""]:
        """Number of the first row that this device owns."""
        return jax.lax.axis_index(self.axes) * self.block

    def stats(self, numbers: Array, rounds: Array) -> LookupStats:
        invalid = jax.lax.psum((numbers == self.absent).sum(dtype=jnp.int32), self.axes)
        overflow = jax.lax.psum(jnp.maximum(self.end - self.start - self.room, 0).sum(), self.axes)
        return LookupStats(invalid, overflow, rounds)


def _fetch(table: Float[Array, "block head_dim"], asked: _Asked) -> tuple[Float[Array, "N head_dim"], Int[Array, ""]]:
    """The values of this device's distinct rows, and the number of rounds. Every device ends in the same round."""

    def one_round(carry: Any) -> Any:
        values, start, _, rounds = carry
        places, there = asked.next(start)
        wanted = asked.exchanged(jnp.where(there, asked.found.rows.at[places].get(mode="clip"), asked.absent))
        answers = asked.exchanged(table.at[wanted - asked.own()].get(mode="fill", fill_value=0.0))
        values = values.at[jnp.where(there, places, values.shape[0])].set(answers, mode="drop")
        start = jnp.minimum(start + asked.room, asked.end)
        return values, start, asked.left(start), rounds + 1

    values = jnp.zeros((asked.found.rows.size, table.shape[1]), table.dtype)
    carry = (values, asked.start, asked.left(asked.start), jnp.zeros((), jnp.int32))
    values, _, _, rounds = jax.lax.while_loop(lambda carry: carry[2] > 0, one_round, carry)
    return values, rounds


def _send(sums: Float[Array, "N head_dim"], asked: _Asked) -> tuple[RowGradients, Int[Array, ""]]:
    """The gradients of the rows that this device owns, and the number of rounds.

    The owner sums over devices in the order of the devices, whatever the size of a round. For that, all gradients of a row must come in one
    round: of what has come, the owner takes the rows up to the least last one of the devices that have more to send, and tells where it
    stopped. Every device goes on from there. So rows come to their end in rising order, and what is taken is appended.
    """
    room, absent = asked.room, asked.absent
    most = min(asked.shards * sums.shape[0], asked.block)
    batch = asked.shards * room

    def one_round(carry: Any) -> Any:
        rows, values, count, start, _, rounds = carry
        places, there = asked.next(start)
        came = asked.exchanged(jnp.where(there, asked.found.rows.at[places].get(mode="clip"), absent))
        came_values = asked.exchanged(sums.at[places].get(mode="clip"))
        more = asked.exchanged((start + room < asked.end).astype(jnp.int32)) > 0
        stop = jnp.where(more, came[:, -1], absent - 1).min()

        taken = jnp.where(came <= stop, came, absent)
        found = distinct(taken.reshape(-1), absent)
        place = jnp.zeros(batch, jnp.int32).at[found.order].set(found.position).reshape(taken.shape)
        place = jnp.where(taken < absent, place, batch)

        def add_device(device: Array, total: Array) -> Array:
            return total.at[place[device]].add(came_values[device], mode="drop")  # no row twice, so in any order

        total = jax.lax.fori_loop(0, asked.shards, add_device, jnp.zeros((batch, sums.shape[1]), jnp.float32))
        rows = jax.lax.dynamic_update_slice(rows, found.rows, (count,))
        values = jax.lax.dynamic_update_slice(values, total, (count, jnp.zeros_like(count)))
        count = count + (found.rows < absent).sum(dtype=jnp.int32)

        stops = jax.lax.all_gather(stop, asked.axes)
        sent = (there & (asked.found.rows.at[places].get(mode="clip") <= stops[:, None])).sum(axis=1, dtype=jnp.int32)
        start = start + sent
        return rows, values, count, start, asked.left(start), rounds + 1

    zero = jnp.zeros((), jnp.int32)
    rows = jnp.full(most + batch, absent, jnp.int32)  # room behind the end: a round writes all of its places, used or not
    values = jnp.zeros((most + batch, sums.shape[1]), jnp.float32)
    carry = (rows, values, zero, asked.start, asked.left(asked.start), zero)
    rows, values, _, _, _, rounds = jax.lax.while_loop(lambda carry: carry[4] > 0, one_round, carry)
    return RowGradients(rows[:most], values[:most]), rounds
