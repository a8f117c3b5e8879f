"""One chunk of queries in plain XLA, forward and backward: for any shape, any float type and any platform.

A block of queries that shares its keys gathers their latents once, and its products are matrix products of all its heads and queries with
these rows: one query where tokens are chosen, all of them where they choose most of the keys, PAGE where pages are. Every index is in
bounds, so none is checked.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import GatherDimensionNumbers, GatherScatterMode, ScatterDimensionNumbers

from pallas_kernels.choose import target
from pallas_kernels.sparse_attention.spec import NO_KEYS, wide_type
from pallas_kernels.visible import PAGE, Selected, mask_of_tokens, masking_pays

MOST_LOGITS = 1 << 26  # of a chunk whose keys are masked: 256 MiB of float32

Array = jax.Array
Attended = tuple[Array, Array, Array]


class _Gathered(NamedTuple):
    """Where the keys of n blocks of Q queries lie: `window` tokens each from `start` [B, n, w] on. `valid` [B, n, Q, w * window]: seen."""

    start: Array
    window: int
    valid: Array


def attend_tokens(q: Array, latent: Array, index: Array, count: Array, *, rank: int, scale: float) -> Attended:
    """Attention of a chunk to chosen tokens.

    q [B, C, H, K+R] absorbed queries, latent [B, T, K+R] of their type, index [B, C, k], count [B, C] -> attended latents o [B, C, H, K] in
    q's type, log_total and top [B, C, H] float32 or wider (see `spec.SparseAttended`). The first K = `rank` columns of latents are values
    as well.
    """
    return _attend(q, latent, _of_tokens(q, latent, index, count), rank, scale)


def attend_tokens_backward(
    q: Array, latent: Array, index: Array, count: Array, log_total: Array, own: Array, d_o: Array, d_latent: Array, *, scale: float
) -> Attended:
    """Gradients of a chunk of `attend_tokens`.

    log_total [B, C, H] as it was returned, own [B, C, H] = sum over K of o d_o, d_o [B, C, H, K], d_latent [B, T, K+R] float32 or wider,
    the sum so far -> d_q [B, C, H, K+R] in q's type, o [B, C, H, K] once more, and d_latent with the chunk's share added.
    """
    return _attend_backward(q, latent, _of_tokens(q, latent, index, count), log_total, own, d_o, d_latent, scale)


def attend_pages(q: Array, latent: Array, index: Array, count: Array, first: Array, stop: Array, *, rank: int, scale: float) -> Attended:
    """As `attend_tokens`, to the tokens first <= j < stop [B, C] of pages index [B, n, p], count [B, n] of n equal blocks of queries."""
    return _attend(q, latent, _of_pages(latent, index, count, first, stop), rank, scale)


def attend_pages_backward(
    q: Array,
    latent: Array,
    index: Array,
    count: Array,
    first: Array,
    stop: Array,
    log_total: Array,
    own: Array,
    d_o: Array,
    d_latent: Array,
    *,
    scale: float,
) -> Attended:
    """As `attend_tokens_backward`, of `attend_pages`."""
    return _attend_backward(q, latent, _of_pages(latent, index, count, first, stop), log_total, own, d_o, d_latent, scale)


def _of_tokens(q: Array, latent: Array, index: Array, count: Array) -> _Gathered:
    """One block a query; or one for all, of all keys, where that costs less and its logits are not too many."""
    keys, (batch, length, heads, _) = latent.shape[1], q.shape
    if masking_pays(keys, index.shape[-1]) and batch * length * heads * keys <= MOST_LOGITS:
        return _Gathered(jnp.zeros((batch, 1, 1), index.dtype), keys, mask_of_tokens(Selected(index, count), keys)[:, None])
    valid = jnp.arange(index.shape[-1])[None, None, None] < count[:, :, None, None]
    return _Gathered(index, 1, valid)


def _of_pages(latent: Array, index: Array, count: Array, first: Array, stop: Array) -> _Gathered:
    keys = latent.shape[1]
    batch, blocks, pages = index.shape
    window = min(PAGE, keys)
    begin = index * PAGE
    start = jnp.minimum(begin, keys - window)  # the last page may be short: what then stands before it belongs to another
    token = start[..., None] + jnp.arange(window, dtype=index.dtype)[None, None, None]
    chosen = (token >= begin[..., None]) & (jnp.arange(pages)[None, None] < count[..., None])[..., None]
    token, chosen = (x.reshape(batch, blocks, 1, -1) for x in (token, chosen))
    first, stop = (x.reshape(batch, blocks, -1, 1) for x in (first, stop))
    return _Gathered(start, window, chosen & (token >= first) & (token < stop))


def _attend(q: Array, latent: Array, keys: _Gathered, rank: int, scale: float) -> Attended:
    q, shape = _blocked(q, keys), q.shape[:3]
    rows = _rows(latent, keys)
    seen = keys.valid[:, :, :, None]
    logits = jnp.where(seen, _product("bnqhw,bnkw->bnqhk", q, rows) * scale, 10 * NO_KEYS)
    top = jnp.maximum(logits.max(axis=-1, keepdims=True), NO_KEYS)
    weight = jnp.exp(logits - top)  # 0 where nothing is seen, as top is then far above
    total = weight.sum(axis=-1, keepdims=True)
    some = total > 0
    total = jnp.where(some, total, 1)
    o = _product("bnqhk,bnkw->bnqhw", weight.astype(rows.dtype), rows[..., :rank]) / total
    return o.astype(q.dtype).reshape(*shape, rank), (top + jnp.log(total)).reshape(shape), top.reshape(shape)


def _attend_backward(
    q: Array, latent: Array, keys: _Gathered, log_total: Array, own: Array, d_o: Array, d_latent: Array, scale: float
) -> Attended:
    shape, rank = q.shape, d_o.shape[-1]
    q, d_o, log_total, own = (_blocked(x, keys) for x in (q, d_o, log_total[..., None], own[..., None]))
    rows = _rows(latent, keys)
    values = rows[..., :rank]
    logits = _product("bnqhw,bnkw->bnqhk", q, rows) * scale
    weight = jnp.where(keys.valid[:, :, :, None], jnp.exp(logits - log_total), 0)
    d_logits = (weight * (_product("bnqhw,bnkw->bnqhk", d_o, values) - own) * scale).astype(q.dtype)
    weight = weight.astype(q.dtype)
    o = _product("bnqhk,bnkw->bnqhw", weight, values)
    d_q = _product("bnqhk,bnkw->bnqhw", d_logits, rows)
    d_rows = _product("bnqhk,bnqhw->bnkw", d_logits, q)
    d_rows = d_rows.at[..., :rank].add(_product("bnqhk,bnqhw->bnkw", weight, d_o))
    return (
        d_q.astype(q.dtype).reshape(shape),
        o.astype(q.dtype).reshape(d_o.shape).reshape(*shape[:3], rank),
        _added(d_latent, d_rows, keys),
    )


def _blocked(x: Array, keys: _Gathered) -> Array:
    """[B, C, ...] -> [B, n, Q, ...]."""
    return x.reshape(*keys.valid.shape[:3], *x.shape[2:])


def _flat_start(keys: _Gathered, length: int) -> Array:
    """Where windows start in latents of all sequences in one row, [B, n, w, 1]."""
    sequence = jnp.arange(keys.start.shape[0], dtype=keys.start.dtype)[:, None, None]
    return (keys.start + sequence * length)[..., None]


def _rows(latent: Array, keys: _Gathered) -> Array:
    """The gathered latents [B, n, w * window, K+R]."""
    batch, length, width = latent.shape
    rows = jax.lax.gather(
        latent.reshape(batch * length, width),
        _flat_start(keys, length),
        GatherDimensionNumbers(offset_dims=(3, 4), collapsed_slice_dims=(), start_index_map=(0,)),
        slice_sizes=(keys.window, width),
        mode=GatherScatterMode.PROMISE_IN_BOUNDS,
    )
    return rows.reshape(*keys.start.shape[:2], -1, width)


def _added(total: Array, d_rows: Array, keys: _Gathered) -> Array:
    """`total` [B, T, K+R] with the rows' gradients added in a fixed order.

    CPU and TPU add in the order of the updates. A GPU adds in any order, so there one block of queries is added at a time: its keys differ
    from each other, and those that are none are sent beyond the end, where they are dropped. The window of a short last page also covers
    rows of the page before it, with zeros, which any order may add; but the windows are not apart then, and must not be called so.
    """
    batch, length, width = total.shape
    add = partial(
        jax.lax.scatter_add,
        dimension_numbers=ScatterDimensionNumbers(update_window_dims=(3, 4), inserted_window_dims=(), scatter_dims_to_operand_dims=(0,)),
    )
    flat, start = total.reshape(batch * length, width), _flat_start(keys, length)
    updates = d_rows.reshape(*keys.start.shape, keys.window, width)
    if target()[0] != "gpu":
        return add(flat, start, updates, mode=GatherScatterMode.PROMISE_IN_BOUNDS).reshape(total.shape)
    used = keys.valid.any(axis=2).reshape(*keys.start.shape, keys.window).any(axis=-1)
    place = jnp.arange(used[:, 0].size, dtype=start.dtype).reshape(batch, 1, -1)
    start = jnp.where(used, start[..., 0], batch * length + place * keys.window)[..., None]
    apart = length % keys.window == 0

    def block(i: Array, flat: Array) -> Array:
        one, gradient = (jax.lax.dynamic_slice_in_dim(x, i, 1, axis=1) for x in (start, updates))
        return add(flat, one, gradient, unique_indices=apart, mode=GatherScatterMode.FILL_OR_DROP)

    return jax.lax.fori_loop(0, start.shape[1], block, flat).reshape(total.shape)


def _product(formula: str, x: Array, y: Array) -> Array:
    return jnp.einsum(formula, x, y, preferred_element_type=wide_type(x))
