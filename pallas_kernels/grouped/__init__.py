"""Products of rows sorted by group with one matrix a group: the routed experts of a mixture.

xla          `jax.lax.ragged_dot`, for any size and platform
tpu          kernels for both directions
gpu          the same for Hopper
choose       which implementation runs
api          what a user calls
cases        real shapes, measured only: what the kernels do depends on how many rows each group has
"""

from pallas_kernels.grouped.api import grouped_matmul

__all__ = ["grouped_matmul"]
