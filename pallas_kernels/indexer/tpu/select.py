"""The largest of many scores on TPU, exactly and in order: a threshold, then the places of what reaches it. XLA would sort everything."""

import jax
import jax.numpy as jnp

from pallas_kernels.indexer import xla
from pallas_kernels.indexer.tpu.compact import compact
from pallas_kernels.indexer.tpu.threshold import KEYS, threshold
from pallas_kernels.tpu.tiles import LANES, Interpret, round_up

MOST_KEYS = 1 << 18  # beyond, eight queries' scores and the matrix of segments no longer fit into VMEM


def top_indices(scores: jax.Array, count: int, *, interpret: Interpret = False) -> jax.Array:
    """`xla.top_indices`."""
    batch, queries, keys = scores.shape
    if keys > MOST_KEYS:
        return xla.top_indices(scores, count)
    rows, columns = round_up(batch * queries, LANES), round_up(keys, KEYS)
    flat = scores.reshape(batch * queries, keys)
    flat = jnp.pad(flat, ((0, rows - batch * queries), (0, columns - keys)), constant_values=-jnp.inf)
    index = compact(flat, *threshold(flat, count, interpret=interpret), count, interpret=interpret)
    return jnp.minimum(index[: batch * queries], keys).reshape(batch, queries, count)
