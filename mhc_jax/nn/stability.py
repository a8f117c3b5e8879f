"""What the residual connections do to signals: gains of single and composite mappings, and how far H_res is from where it should be.

Pure functions of traced mappings. Orientation: x' = H_res x, so the product of sublayers 1..l is H_l ... H_1. Forward gain is the largest
absolute row sum (how much a signal can grow), backward gain the largest absolute column sum (how much a gradient can). Both are computed
for each token and then averaged, as arXiv 2512.24880 does on one sequence (its Figures 3, 7, 8).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mhc_jax.nn.decoder import Aux


class Stability(NamedTuple):
    """L sublayers in the order of the network, n streams. docs/results.md says what each array is."""

    gain_forward_single: Float[Array, "L"]
    gain_backward_single: Float[Array, "L"]
    gain_forward_composite: Float[Array, "L"]  # product of sublayers 1..l
    gain_backward_composite: Float[Array, "L"]  # product of sublayers l..L
    row_error: Float[Array, "L"]  # largest over rows and tokens
    column_error: Float[Array, "L"]
    distance_identity: Float[Array, "L"]  # Frobenius
    distance_uniform: Float[Array, "L"]
    logit_std: Float[Array, "L"]
    res: Float[Array, "L n n"]
    res_composite: Float[Array, "L n n"]  # product of sublayers 1..l
    res_composite_rest: Float[Array, "L n n"]  # product of sublayers l..L
    pre: Float[Array, "L n"]
    post: Float[Array, "L n"]
    stream_norm: Float[Array, "L+1 n"]
    stream_cosine: Float[Array, "L+1"]
    max_attention_logit: Float[Array, "L/2"]


def forward_gain(h: Float[Array, "*L n n T"]) -> Float[Array, "*L"]:
    """Largest absolute row sum, averaged over tokens."""
    return jnp.abs(h.sum(axis=-2)).max(axis=-2).mean(axis=-1)


def backward_gain(h: Float[Array, "*L n n T"]) -> Float[Array, "*L"]:
    """Largest absolute column sum, averaged over tokens."""
    return jnp.abs(h.sum(axis=-3)).max(axis=-2).mean(axis=-1)


def composites(res: Float[Array, "L n n T"]) -> tuple[Float[Array, "L n n T"], Float[Array, "L n n T"]]:
    """Products per token: H_l ... H_1 for every l, and H_L ... H_l for every l."""

    def times(a, b):
        return jnp.einsum("ijt,jkt->ikt", a, b, precision=jax.lax.Precision.HIGHEST)

    start = jnp.broadcast_to(jnp.eye(res.shape[1], dtype=res.dtype)[..., None], res.shape[1:])
    _, upward = jax.lax.scan(lambda p, h: (times(h, p),) * 2, start, res)
    _, downward = jax.lax.scan(lambda p, h: (times(p, h),) * 2, start, res, reverse=True)
    return upward, downward


def stability(aux: Aux) -> Stability:
    """All measures, from a forward pass with `trace=True`."""
    trace = aux.trace
    assert trace is not None, "the forward pass was run without trace=True"
    res = trace.res
    n = res.shape[1]
    upward, downward = composites(res)

    def distance(target: Float[Array, "n n"]) -> Float[Array, "L"]:
        return jnp.sqrt(jnp.square(res - target[None, ..., None]).sum(axis=(1, 2))).mean(axis=-1)

    return Stability(
        gain_forward_single=forward_gain(res),
        gain_backward_single=backward_gain(res),
        gain_forward_composite=forward_gain(upward),
        gain_backward_composite=backward_gain(downward),
        row_error=jnp.abs(res.sum(axis=2) - 1).max(axis=(1, 2)),
        column_error=jnp.abs(res.sum(axis=1) - 1).max(axis=(1, 2)),
        distance_identity=distance(jnp.eye(n)),
        distance_uniform=distance(jnp.full((n, n), 1 / n)),
        logit_std=trace.logit_std,
        res=res.mean(axis=-1),
        res_composite=upward.mean(axis=-1),
        res_composite_rest=downward.mean(axis=-1),
        pre=trace.pre.mean(axis=-1),
        post=trace.post.mean(axis=-1),
        stream_norm=jnp.concatenate([trace.stream_rms, aux.final_stream_rms[None]]),
        stream_cosine=jnp.concatenate([trace.stream_cosine, aux.final_stream_cosine[None]]),
        max_attention_logit=aux.max_attention_logit,
    )
