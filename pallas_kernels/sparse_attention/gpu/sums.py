"""Adds the gradients that lists of latents wrote, each its own share, to the sum over all, in a fixed order: runs give the same bits.

pages    a list's shares are whole pages: XLA adds list after list, because a list names no page twice
tokens   a row for every query and latent: they are sorted by their latent, and a kernel adds up each latent's
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.lax import GatherScatterMode, ScatterDimensionNumbers

from pallas_kernels.visible import PAGE

Array = jax.Array


def plus_pages(total: Array, shares: Array, index: Array, count: Array) -> Array:
    """total [B, T, K+R], shares [B, lists, pages, 64, K+R] of pages index [B, lists, pages], of which `count` are -> the new total."""
    batch, keys, columns = total.shape
    missing = -keys % PAGE
    flat = jnp.pad(total, ((0, 0), (0, missing), (0, 0))) if missing else total
    length = keys + missing
    entries = index.shape[-1]
    number = jnp.arange(entries, dtype=index.dtype)
    sequence = jnp.arange(batch, dtype=index.dtype)
    start = index * PAGE + sequence[:, None, None] * length
    # What is no entry is sent beyond the end, where it is dropped, each to a place of its own.
    beyond = (batch * length + (sequence[:, None] * entries + number[None]) * PAGE)[:, None]
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


def plus_tokens(total: Array, shares: Array, index: Array, count: Array, interpret: bool = False) -> Array:
    """total [B, T, K+R], shares [B, queries, tiles, 64, K+R], a row for each of index [B, queries, entries], of which `count` are."""
    batch, keys, columns = total.shape
    rows = shares.reshape(*index.shape[:2], -1, columns)
    entries = rows.shape[2]
    number, sequence = (jnp.arange(size, dtype=index.dtype) for size in (index.shape[2], batch))
    own = jnp.where(number[None, None] < count[..., None], index + keys * sequence[:, None, None], batch * keys)
    own = jnp.pad(own, ((0, 0), (0, 0), (0, entries - index.shape[2])), constant_values=batch * keys).reshape(-1)
    latents, order = jax.lax.sort((own, jnp.arange(own.size, dtype=jnp.int32)), num_keys=1, is_stable=True)
    begin = jnp.searchsorted(latents, jnp.arange(batch * keys + 1, dtype=latents.dtype), method="scan_unrolled").astype(jnp.int32)
    flat = _sums(total.reshape(-1, columns), rows.reshape(-1, columns), order, begin, interpret)
    return flat.reshape(total.shape)


def _sums(total: Array, rows: Array, order: Array, begin: Array, interpret: bool) -> Array:
    """total [R, C] plus rows[order[begin[r]:begin[r + 1]]] in each row r, one after another. In place."""
    columns = total.shape[1]
    sizes = [1 << bit for bit in range(columns.bit_length()) if columns >> bit & 1]  # Triton's blocks are powers of two
    pieces = [pl.ds(sum(sizes[i + 1 :]), size) for i, size in enumerate(sizes)]

    def body(before: Any, rows: Any, order: Any, begin: Any, total: Any) -> None:
        del before  # the same memory as total
        r = pl.program_id(0)
        first, end = begin[r], begin[r + 1]

        @pl.when(first < end)
        def _visited() -> None:
            def add(i: Array, sums: list[Array]) -> list[Array]:
                at = order[i]
                return [part + rows[at, piece] for part, piece in zip(sums, pieces)]

            for piece, part in zip(pieces, jax.lax.fori_loop(first, end, add, [total[r, piece] for piece in pieces])):
                total[r, piece] = part

    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct(total.shape, total.dtype),
        grid=(total.shape[0],),
        input_output_aliases={0: 0},
        interpret=interpret,
        compiler_params=None if interpret else triton.CompilerParams(num_warps=2, num_stages=2),
        name="sums_of_rows",
    )(total, rows, order, begin)
