"""Sparse latent attention: every query attends to the keys that were chosen for it, in the latent space that all heads share.

spec         what is returned, and how much of it exists at once
reference    the specification in plain jnp, with a mask over all keys
chunks       sparse_mla over chunks of queries, forward and backward, for any implementation of one chunk
xla          one chunk in plain XLA: gathered rows
tpu          one chunk on TPU
choose       which implementation runs
api          what a user calls
cases        real shapes
"""

from pallas_kernels.sparse_attention.api import sparse_mla
from pallas_kernels.sparse_attention.spec import NO_KEYS, SparseAttended

__all__ = ["NO_KEYS", "SparseAttended", "sparse_mla"]
