"""What sparse attention returns and keeps, and how many queries are worked on at once. Computes nothing."""

from typing import NamedTuple

import jax

from pallas_kernels.visible import PAGE

NO_KEYS = -1e29  # log_total and top of a query that sees no key: finite, so that differences of two of them are numbers
XLA_BYTES = 512 << 20  # what one chunk may take on the XLA path: gathered rows, their gradients, logits

TPU_QUERIES = 512  # of all sequences, in a chunk of the backward pass of single tokens on TPU: each keeps 1 MiB (128 heads, 2048 keys)


class SparseAttended(NamedTuple):
    """Attended values, and what losses on the attention need to know; only `out` has gradients.

    out: [B, S, H, V] in the queries' type; 0 for a query without keys.
    log_total: [B, S, H] float32 or wider, the log-sum-exp of the scaled logits over the query's keys; NO_KEYS without any.
    top: [B, S, H], likewise the largest of them.
    """

    out: jax.Array
    log_total: jax.Array
    top: jax.Array


class Keys(NamedTuple):
    """The keys of every query, as the implementations take them.

    index: int32 [B, Q, k]; of tokens, Q = S, or of pages, Q = ceil(S / PAGE) blocks of queries. Valid are the first count.
    count: int32 [B, Q].
    first, stop: int32 [B, S], the span that limits keys of pages; unused for tokens.
    """

    index: jax.Array  # type: ignore[assignment]
    count: jax.Array  # type: ignore[assignment]
    first: jax.Array
    stop: jax.Array


class Weights(NamedTuple):
    """The projections that latents are absorbed into: key_up [K, H, D], value_up [K, H, V]."""

    key_up: jax.Array
    value_up: jax.Array


def wide_type(x: jax.Array) -> jax.typing.DTypeLike:
    """The type of logits and sums: float32, or float64 for float64."""
    return jax.numpy.promote_types(x.dtype, jax.numpy.float32)


def accumulator_rows(keys: int, kernels: str) -> int:
    """Rows of the latents' gradient while it is summed: on TPU whole pages, and one more for the gradients of what is no page."""
    return (-(-keys // PAGE) + 1) * PAGE if kernels == "tpu" else keys


def xla_chunk(batch: int, heads: int, keys: int, width: int, itemsize: int, pages: bool) -> int:
    """Queries of a chunk on the XLA path: as many as XLA_BYTES hold, in whole pages where pages are chosen, but one block at least.

    A block of queries shares `keys` gathered rows: kept are the rows and their gradients in float32, and logits, probabilities and their
    gradients.
    """
    block = PAGE if pages else 1
    needed = keys * width * (itemsize + 8) + block * heads * keys * (12 + 2 * itemsize)
    return block * max(1, XLA_BYTES // (batch * needed))
