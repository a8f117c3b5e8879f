"""What the backward pass recomputes, as named policies.

none      nothing: fastest, most memory
streams   the streams between sublayers, by the seams alone, from those at the start of a block of layers: attention and feed-forward
          keep what they need and never run twice (arXiv 2512.24880, section 4.2 and Eq. 20)
matmuls   everything but the results of matrix products with parameters
attention the whole layer, but not attention itself: of it the output and the logarithm of its sums are kept (n_heads times the width of
          a value, and one number a head), so that its kernel runs once
full      the whole layer: only the streams between layers are kept
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
from jax.ad_checkpoint import checkpoint_name

RematPolicy = Literal["none", "streams", "matmuls", "attention", "full"]

# Layers of a stack that is unrolled. A loop copies a layer's parameters and saved activations out of and into stacked arrays: a seventh of
# the `laptop` step on a CPU. Unrolling a deeper stack costs more time in the compiler, and unrolling it in part gains nothing. Where memory
# is to be saved, a loop also keeps the compiler from recomputing several layers at once.
LONGEST_UNROLLED = 8

_KEPT = "kept by a sublayer"

# What is kept by the policies that recompute layers. Kernels name what of attention their backward pass takes.
_SAVEABLE = {
    "matmuls": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
    "full": None,
}


def scan_layers(step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, layers: Any, policy: RematPolicy, streams: int) -> tuple[Any, Any]:
    """`jax.lax.scan` of `step` over stacked layers, of two sublayers each, whose backward pass recomputes what the policy says."""
    count = len(jax.tree.leaves(layers)[0])
    if policy == "none":
        return jax.lax.scan(step, carry, layers, unroll=count <= LONGEST_UNROLLED)
    if policy != "streams":
        return jax.lax.scan(jax.checkpoint(step, policy=_SAVEABLE[policy]), carry, layers)

    def block(carry: Any, layers: Any) -> tuple[Any, Any]:
        return jax.lax.scan(step, carry, layers)

    kept_only = jax.checkpoint(block, policy=jax.checkpoint_policies.save_only_these_names(_KEPT))
    length = min(block_length(count, streams), count)
    whole = count - count % length
    blocks = jax.tree.map(lambda a: a[:whole].reshape(-1, length, *a.shape[1:]), layers)
    carry, reports = jax.lax.scan(kept_only, carry, blocks)
    reports = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), reports)
    if whole < count:
        carry, last = kept_only(carry, jax.tree.map(lambda a: a[whole:], layers))
        reports = jax.tree.map(lambda a, b: jax.numpy.concatenate([a, b]), reports, last)
    return carry, reports


def recomputed(f: Callable[..., Any], policy: RematPolicy) -> Callable[..., Any]:
    """`f`, which stands between stacks of layers, with its backward pass as the policy says."""
    if policy in ("none", "streams"):
        return f
    return jax.checkpoint(f, policy=_SAVEABLE[policy])


def block_length(layers: int, streams: int) -> int:
    """Layers in a block that make the kept and the recomputed streams together the fewest bytes.

    Eq. 20 minimises n C ceil(L / L_r) + (n + 2) C L_r over the sublayers L_r of a block; its solution is near sqrt(n L / (n + 2)).
    """
    sublayers = 2 * layers
    costs = {half: streams * -(-sublayers // (2 * half)) + (streams + 2) * 2 * half for half in range(1, layers + 1)}
    return min(costs, key=lambda half: costs[half])


def kept(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f(*args)`, whose backward pass finds under the policy `streams` all that it needs kept, but its arguments: those are recomputed."""

    @jax.custom_vjp
    def call(*args: Any) -> Any:
        return f(*args)

    def forward(*args: Any) -> tuple[Any, Any]:
        out, pull = jax.vjp(f, *args)
        arguments = {id(leaf) for leaf in jax.tree.leaves(args)}
        named = jax.tree.map(lambda leaf: leaf if id(leaf) in arguments else checkpoint_name(leaf, _KEPT), pull)
        return jax.tree.map(lambda leaf: checkpoint_name(leaf, _KEPT), out), named

    call.defvjp(forward, lambda pull, cotangents: pull(cotangents))
    return call
