"""Dense attention on Hopper GPUs (Pallas, Mosaic GPU): H100 and H200. Held to float64 and timed on an H200.

forward     one program for 128 queries, past which keys come
backward    the same for the queries' gradients, and one program for 128 keys, past which queries come
walk        which tiles a program visits
"""

import jax
import jax.numpy as jnp

from pallas_kernels.attention.gpu.backward import dense_attention_backward as dense_attention_backward
from pallas_kernels.attention.gpu.forward import dense_attention as dense_attention

WIDTHS = 128, 64, 128  # D, R and V: what shared memory and registers are divided for


def misfit(q_nope: jax.Array, q_rope: jax.Array, value: jax.Array) -> str | None:
    """What about these arrays the kernels cannot take."""
    if q_nope.dtype != jnp.bfloat16:
        return f"the arrays are {q_nope.dtype}; the GPU kernels take bfloat16"
    if (widths := tuple(x.shape[3] for x in (q_nope, q_rope, value))) != WIDTHS:
        return "D, R and V are {}, {} and {}; the GPU kernels take {}, {} and {}".format(*widths, *WIDTHS)
    return None
