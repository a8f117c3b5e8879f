"""What the backward pass recomputes of a layer, as named policies.

none      nothing: fastest, most memory
matmuls   everything but the results of matrix products with parameters
full      the whole layer: only the streams between layers are kept
"""

from collections.abc import Callable
from typing import Literal

import jax

RematPolicy = Literal["none", "matmuls", "full"]


def remat(f: Callable, policy: RematPolicy) -> Callable:
    """`f` with its intermediate values recomputed as the policy says."""
    if policy == "none":
        return f
    saveable = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if policy == "matmuls" else None
    return jax.checkpoint(f, policy=saveable)
