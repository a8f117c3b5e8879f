"""As many blocks through tokamax's splash attention, to compare with. It runs in an environment that has tokamax; nothing else needs it.

splash reads which blocks lie under the mask from memory, where the cost model cannot follow it. So it is given a rectangle of queries and
keys with as many blocks as the causal triangle has, and no mask: what its causal kernel takes beside that for masks is not charged. Its
queries and keys are both parts joined, 192 wide, the rotated key repeated for every head, and the scale is already in its queries. Blocks,
layouts and scheduler are those that its own tuning found for this shape on tpu7x.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

BLOCK = 1024


def build(direction: str, heads: int, length: int, width: int, out_width: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """splash on half of the queries and a block more than all of the keys; backward, where keys are the outer loop, the other way round."""
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    queries, keys = length // 2, length + BLOCK
    if direction == "backward":
        queries, keys = keys, queries
    layout = splash_attention_kernel.QKVLayout
    config = splash_attention_kernel.SplashConfig(
        block_q=BLOCK,
        block_kv=BLOCK,
        block_kv_compute=512,
        block_q_dkv=BLOCK,
        block_kv_dkv=BLOCK,
        block_kv_dkv_compute=BLOCK,
        q_layout=layout.SEQ_MINOR if direction == "forward" else layout.HEAD_DIM_MINOR,
        k_layout=layout.SEQ_MINOR if direction == "forward" else layout.HEAD_DIM_MINOR,
        use_experimental_scheduler=direction == "forward",
        dq_reduction_steps=3,
    )
    mask = splash_attention_mask.FullMask((queries, keys))
    kernel = splash_attention_kernel._make_splash_attention(mask, config=config, is_mqa=False, q_seq_shards=1)

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    args = array(heads, queries, width), array(heads, keys, width), array(heads, keys, out_width)
    if direction == "forward":
        return kernel, args
    pull = jax.eval_shape(lambda *args: jax.vjp(kernel, *args)[1], *args)  # what it saves is an argument: the backward pass alone
    return lambda pull, cotangent: pull(cotangent), (pull, array(heads, queries, out_width))
