"""What the kernels share: where tiles of latents come from, tokens or pages, and which of them a query sees."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import gather
from pallas_kernels.visible import PAGE

Array = jax.Array

ROWS = 64  # rows of a wgmma: heads of a program, or latents of one
LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Source:
    """Latents by tiles of `size`, in lists that `block` queries share: one query's tokens, or pages.

    refs: latent [B * T, K+R], index [B * lists, entries], count [B * lists], and of pages first and stop [B * C]. T is a multiple of 64,
    and so are the entries of a list of tokens.
    """

    refs: dict[str, Any]
    keys: int  # T
    queries: int  # C
    block: int
    size: int
    pages: bool
    swizzle: int  # of the tiles in shared memory
    interpret: bool

    def list_of(self, query: Array) -> Array:
        return query // self.block

    def tiles(self, chosen: Array) -> Array:
        """How many tiles a list has."""
        count = self.refs["count"][chosen]
        return count * (PAGE // self.size) if self.pages else (count + self.size - 1) // self.size

    def seen(self, query: Array, tile: Array, number: Array) -> Array:
        """Whether the query sees the latents of these numbers in a tile of its list."""
        chosen, start = self.list_of(query), tile * self.size
        if not self.pages:
            return number < self.refs["count"][chosen] - start
        key = number + self.refs["index"][chosen, start // PAGE] * PAGE + jax.lax.rem(start, jnp.int32(PAGE))
        return (key >= self.refs["first"][query]) & (key < self.refs["stop"][query])

    def start_copy(self, chosen: Array, tile: Array, to: Any, barrier: Any) -> None:
        """Starts to copy a tile; of pages, it arrives at the barrier by itself."""
        begin = chosen // (self.queries // self.block) * self.keys
        latent, index, start = self.refs["latent"], self.refs["index"], tile * self.size
        if self.pages:
            row = begin + index[chosen, start // PAGE] * PAGE + jax.lax.rem(start, jnp.int32(PAGE))
            plgpu.copy_gmem_to_smem(latent.at[pl.ds(row, self.size)], to, barrier)
        else:
            gather.start_copy(
                latent.at[pl.ds(begin, self.keys)], index.at[chosen, pl.ds(start, self.size)], to, self.interpret, self.swizzle
            )

    def arrive(self, but: int, barrier: Any) -> None:
        """Waits for what was copied of tokens before the last `but` tiles, and arrives at the barrier."""
        if not self.pages:
            gather.wait_for_copies(but, self.interpret)
            plgpu.barrier_arrive(barrier)


def filled(x: Array, axis: int) -> Array:
    """The axis filled with zeros to a multiple of 64."""
    widths = [(0, -x.shape[axis] % ROWS if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths) if x.shape[axis] % ROWS else x


def inputs_of(latent: Array, index: Array, count: Array, span: tuple[Array, Array] | None) -> dict[str, Array]:
    """The refs of a `Source`."""
    latent = filled(latent, 1)
    index = filled(index, 2) if span is None else index
    flat = {"latent": latent.reshape(-1, latent.shape[-1]), "index": index.reshape(-1, index.shape[-1]), "count": count.reshape(-1)}
    return flat if span is None else flat | {"first": span[0].reshape(-1), "stop": span[1].reshape(-1)}
