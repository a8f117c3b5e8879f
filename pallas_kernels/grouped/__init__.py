"""Products of rows sorted by group with one matrix a group: the routed experts of a mixture.

reference    the specification in plain jnp
xla          `jax.lax.ragged_dot`, for any size and platform
tpu          kernels for both directions
choose       which implementation runs
api          what a user calls
"""

from pallas_kernels.grouped.api import grouped_matmul

__all__ = ["grouped_matmul"]
