"""The dense feed-forward: SwiGLU (arXiv 2002.05202)."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from mhc_jax.nn.linear import project
from mhc_jax.nn.module import Module, Spec, normal
from mhc_jax.parallel.rules import Rules
from mhc_jax.parallel.shards import constrained, shard_count


def gated(x: Float[Array, "... gate_up"]) -> Float[Array, "... gate_up//2"]:
    """silu(gate) * up, of the two halves of the last axis."""
    half = x.shape[-1] // 2
    return jax.nn.silu(x[..., :half]) * x[..., half:]


class SwiGLU(Module):
    """out(silu(x gate) * (x up)); the gate and up matrices lie side by side in `inner`."""

    inner: Float[Array, "C 2*F"]
    out: Float[Array, "F C"]

    SPECS: ClassVar = {"inner": Spec(("embed", "hidden"), decay=True), "out": Spec(("hidden", "embed"), decay=True)}

    def __init__(self, dim: int, hidden: int, std: float, key: PRNGKeyArray):
        k_inner, k_out = jax.random.split(key)
        self.inner = normal(k_inner, (dim, 2 * hidden), std)
        self.out = normal(k_out, (hidden, dim), std)

    def __call__(self, x: Float[Array, "... C"], rules: Rules = Rules()) -> Float[Array, "... C"]:
        """The feed-forward output, in x's type."""
        if shard_count(rules, "hidden") == 1:
            return project(gated(project(x, self.inner)), self.out)
        # A device's columns of `inner` are of one half. The two are exchanged so that it has the same columns of both: a part of a matrix
        # and not, as it would be behind the product, of every token's hidden values.
        halves = jnp.split(self.inner.astype(x.dtype), 2, axis=1)
        gate, up = (project(x, constrained(half, rules, "embed", "hidden")) for half in halves)
        return project(jax.nn.silu(gate) * up, self.out)
