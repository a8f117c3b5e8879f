"""Adds the gradients that lists of latents wrote, each its own share, to the sum over all. XLA, in a fixed order.

A list names no latent twice, so the shares of one list can be added in any order; lists are added one after another.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.lax import GatherScatterMode, ScatterDimensionNumbers

from pallas_kernels.visible import PAGE

Array = jax.Array


def plus_shares(total: Array, shares: Array, index: Array, count: Array, pages: bool) -> Array:
    """total [B, T, K+R], shares [B, lists, tiles, 64, K+R] of latents index [B, lists, entries], of which `count` are -> the new total."""
    batch, keys, columns = total.shape
    window = PAGE if pages else 1
    entries = index.shape[-1]
    missing = -keys % window
    flat = jnp.pad(total, ((0, 0), (0, missing), (0, 0))) if missing else total
    length = keys + missing
    shares = shares.reshape(*index.shape[:2], -1, window, columns)[:, :, :entries]
    number = jnp.arange(entries, dtype=index.dtype)
    sequence = jnp.arange(batch, dtype=index.dtype)
    start = index * window + sequence[:, None, None] * length
    # What is no entry is sent beyond the end, where it is dropped, each to a place of its own.
    beyond = (batch * length + (sequence[:, None] * entries + number[None]) * window)[:, None]
    start = jnp.where(number[None, None] < count[..., None], start, beyond)
    add = partial(
        jax.lax.scatter_add,
        dimension_numbers=ScatterDimensionNumbers(update_window_dims=(2, 3), inserted_window_dims=(), scatter_dims_to_operand_dims=(0,)),
        unique_indices=True,
        mode=GatherScatterMode.FILL_OR_DROP,
    )

    def one(i: Array, flat: Array) -> Array:
        at, share = (jax.lax.dynamic_index_in_dim(x, i, 1, keepdims=False) for x in (start, shares))
        return add(flat, at[..., None], share)

    flat = jax.lax.fori_loop(0, index.shape[1], one, flat.reshape(batch * length, columns))
    return flat.reshape(batch, length, columns)[:, :keys]
