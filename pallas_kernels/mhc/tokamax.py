"""The same cases through tokamax, to compare with. It runs in an environment that has tokamax, and nothing else needs it.

tokamax has no backward pass, reads and writes its mixing matrices with tokens first, and leaves the gates and Sinkhorn's steps to XLA.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.mhc.spec import Mapping

N = 4
KERNELS = {"mhc_post_pre": "mhc_fused_post_pre", "mhc_pre": "mhc_pre", "mhc_post": "mhc_post"}  # all of them forward
OPTIONS = {"rms_eps": 1e-6, "hc_pre_eps": 1e-6, "hc_sinkhorn_eps": 1e-6, "hc_post_mult_value": 2.0, "sinkhorn_repeat": 20}


def build(kernel: str, tokens: int, width: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """tokamax's TPU kernel for the forward pass of one of KERNELS, and its arguments."""
    rows = Mapping(N).rows

    def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    x, y = array(tokens, N * width, dtype=jnp.bfloat16), array(tokens, width, dtype=jnp.bfloat16)
    mixes = (array(tokens, N), array(tokens, N, N))
    weights = (array(rows, N * width), array(3), array(rows))
    args = {"mhc_post_pre": (y, x, *mixes, *weights), "mhc_pre": (x, *weights), "mhc_post": (y, x, *mixes)}[kernel]

    def call(*args: Any) -> Any:
        from tokamax import config
        from tokamax._src.ops.mhc import api

        options = {} if kernel == "mhc_post" else OPTIONS
        with config.cross_compile(True):
            return getattr(api, KERNELS[kernel])(*args, **options, implementation="mosaic_tpu")

    return call, args
