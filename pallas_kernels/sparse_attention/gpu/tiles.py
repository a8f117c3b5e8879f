"""Where tiles of 64 latents come from, tokens or pages, and which of their rows a query sees. No attention.

One warpgroup of a program, the last, brings tiles; the others use them. Two tiles are in shared memory: `full` says that one has arrived,
`empty` that all who use it have done so.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import gather
from pallas_kernels.gpu.launch import shared
from pallas_kernels.gpu.products import column_numbers

ROWS = 64  # latents of a tile, which is a page; heads of a program
SLOTS = 2  # tiles in shared memory
INPUTS = ("index", "count", "first", "stop")


@dataclass(frozen=True)
class Source:
    """Tiles of one query, `query` of all [B * C], in a sequence whose latents begin at row `begin`.

    Tokens: index [B * C, k], count [B * C]. Pages: index [B * C / 64, p], count [B * C / 64], first and stop [B * C].
    """

    refs: dict[str, Any]
    query: jax.Array
    begin: jax.Array
    keys: int
    pages: bool
    interpret: bool

    @property
    def list(self) -> jax.Array:
        """The row of `index` that is this query's."""
        return self.query // ROWS if self.pages else self.query

    def steps(self) -> jax.Array:
        count = self.refs["count"][self.list]
        return count if self.pages else (count + ROWS - 1) // ROWS

    def seen(self, step: jax.Array) -> jax.Array:
        """bool [64, 64], the same for all rows: which latents of a tile take part."""
        column = column_numbers(ROWS, self.interpret)
        if not self.pages:
            return column < self.refs["count"][self.list] - step * ROWS
        key = column + self.refs["index"][self.list, step] * ROWS
        return (key >= self.refs["first"][self.query]) & (key < self.refs["stop"][self.query])

    def bring(self, tiles: Any, full: Any, empty: Any) -> None:
        """What the last warpgroup does: all tiles, one after another."""
        steps = self.steps()

        def fetch(step, _):
            slot = jax.lax.rem(step, jnp.int32(SLOTS))

            @pl.when(step >= SLOTS)
            def _():
                plgpu.barrier_wait(empty.at[slot])

            if self.pages:
                row = self.begin + self.refs["index"][self.list, step] * ROWS
                plgpu.copy_gmem_to_smem(self.refs["latent"].at[pl.ds(row, ROWS)], tiles.at[slot], full.at[slot])
                return ()
            source, index = self.refs["latent"].at[pl.ds(self.begin, self.keys)], self.refs["index"].at[self.list, pl.ds(step * ROWS, ROWS)]
            gather.start_copy(source, index, tiles.at[slot], self.interpret)

            @pl.when(step > 0)
            def _():
                gather.wait_for_copies(1, self.interpret)
                plgpu.barrier_arrive(full.at[jax.lax.rem(step - 1, jnp.int32(SLOTS))])

            return ()

        jax.lax.fori_loop(0, steps, fetch, ())
        if not self.pages:

            @pl.when(steps > 0)
            def _():
                gather.wait_for_copies(0, self.interpret)
                plgpu.barrier_arrive(full.at[jax.lax.rem(steps - 1, jnp.int32(SLOTS))])

    def use(self, body: Callable, carry: Any, tiles: Any, full: Any, empty: Any) -> Any:
        """What the others do: carry = body(step, tile, carry) for all tiles; returns the last carry."""

        def advance(step, carry):
            slot = jax.lax.rem(step, jnp.int32(SLOTS))
            plgpu.barrier_wait(full.at[slot])
            carry = body(step, tiles.at[slot], carry)
            plgpu.barrier_arrive(empty.at[slot])
            return carry

        return jax.lax.fori_loop(0, self.steps(), advance, carry)


def scratch(columns: int, dtype: Any, users: int) -> tuple[Any, Any, Any]:
    """Tiles, full and empty."""
    barrier = plgpu.Barrier(num_barriers=SLOTS)
    return shared((SLOTS, ROWS, columns), dtype), barrier, plgpu.Barrier(num_arrivals=users, num_barriers=SLOTS)


def padded(x: jax.Array, axis: int) -> jax.Array:
    """The axis filled with zeros to a multiple of 64."""
    widths = [(0, -x.shape[axis] % ROWS if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths) if x.shape[axis] % ROWS else x
