"""Pallas Mosaic GPU kernels for Hopper (H100, H200), for one chunk of queries.

forward     the kernel that attends
backward    the two kernels that go back, for queries and for latents
sums        adds the latents' gradients in a fixed order
tiles       where latents come from, and how they are handed on

The functions here are those of `xla`, with the same arguments.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.sparse_attention.gpu.backward import gradient_of_latents, gradient_of_queries
from pallas_kernels.sparse_attention.gpu.forward import attend
from pallas_kernels.sparse_attention.gpu.sums import plus_shares
from pallas_kernels.sparse_attention.gpu.tiles import ROWS

Array = jax.Array
Attended = tuple[Array, Array, Array]

SHARES_BYTES = 512 << 20  # of the latents' gradients that are not yet added up


def misfit(latent: Array, rank: int, heads: int) -> str | None:
    """What about latents [B, T, K+R] of which K = `rank`, and heads, these kernels cannot take."""
    if latent.dtype != jnp.bfloat16:
        return f"the latents are {latent.dtype}; the GPU kernels take bfloat16"
    if heads % ROWS:
        return f"there are {heads} heads; the GPU kernels need a multiple of {ROWS}"
    rotated = latent.shape[-1] - rank
    if rank % 128 or rank > 512 or rotated % 64 or not 0 < rotated <= 576 - rank:
        return f"K is {rank} and R is {rotated}; the GPU kernels need multiples of 128 and 64, K + R up to 576, K up to 512"
    return None


def attend_tokens(q: Array, latent: Array, index: Array, count: Array, *, rank: int, scale: float, interpret: bool = False) -> Attended:
    """As `xla.attend_tokens`."""
    return attend(q, latent, index, count, None, rank, scale, interpret)


def attend_pages(
    q: Array, latent: Array, index: Array, count: Array, first: Array, stop: Array, *, rank: int, scale: float, interpret: bool = False
) -> Attended:
    """As `xla.attend_pages`."""
    return attend(q, latent, index, count, (first, stop), rank, scale, interpret)


def attend_tokens_backward(
    q: Array,
    latent: Array,
    index: Array,
    count: Array,
    log_total: Array,
    own: Array,
    d_o: Array,
    d_latent: Array,
    *,
    scale: float,
    interpret: bool = False,
) -> Attended:
    """As `xla.attend_tokens_backward`; shares of as many queries as SHARES_BYTES hold exist at once."""
    o, _, _ = attend(q, latent, index, count, None, d_o.shape[-1], scale, interpret)
    d_q = gradient_of_queries(q, latent, index, count, None, log_total, own, d_o, scale, interpret)
    queries = q.shape[1]
    most = SHARES_BYTES // (4 * index.size // queries * latent.shape[-1])
    size = max(n for n in range(1, queries + 1) if queries % n == 0 and n <= max(1, most))

    def some(i: Array | int, d_latent: Array) -> Array:
        def part(x: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis=1)

        shares = gradient_of_latents(
            part(q), latent, part(index), part(count), None, part(log_total), part(own), part(d_o), scale, interpret
        )
        return plus_shares(d_latent, shares, part(index), part(count), False)

    return d_q, o, some(0, d_latent) if size == queries else jax.lax.fori_loop(0, queries // size, some, d_latent)


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
    interpret: bool = False,
) -> Attended:
    """As `xla.attend_pages_backward`."""
    span = first, stop
    o, _, _ = attend(q, latent, index, count, span, d_o.shape[-1], scale, interpret)
    d_q = gradient_of_queries(q, latent, index, count, span, log_total, own, d_o, scale, interpret)
    shares = gradient_of_latents(q, latent, index, count, span, log_total, own, d_o, scale, interpret)
    return d_q, o, plus_shares(d_latent, shares, index, count, True)
