"""mHC: coefficients predicted from all streams, H_res doubly stochastic. And its control, identity HC.

Source: arXiv 2512.24880, Eq. 7-9 and 14-19. The paper publishes no initial values but alpha = 0.01. Those here make the network exactly the
pre-norm residual network at step 0 and let all mappings learn:

    phi = 0       coefficients start static
    post bias 0   2 sigmoid(0) = 1
    pre bias      0.7 on stream k mod n for sublayer k, the rest shared evenly: sums to 1, and differs between sublayers. Were it the same
                  for all streams, streams would stay equal copies for ever and H_res would never get a gradient
    res bias      `res_diagonal` on the diagonal: near the identity, so that differences between streams survive depth
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from mhc_jax.config import ModelConfig
from mhc_jax.nn.module import Spec
from mhc_jax.nn.norm import inverse_rms, wide
from mhc_jax.nn.residual.socket import Connection
from mhc_jax.nn.residual.streams import Pending, flat
from mhc_jax.parallel.rules import Rules
from mhc_jax.parallel.shards import STREAMS, TOKENS_LAST, on_shards
from pallas_kernels.mhc import Mapping, Weights, mhc_post_pre

PRE_FAVOURED = 0.7  # initial share that a sublayer reads from its favoured stream


def projected(
    x: Float[Array, "B S nC"], phi: Float[Array, "K nC"], alpha: Float[Array, ""] | Float[Array, "K 1"], bias: Float[Array, "K"], eps: float
) -> Float[Array, "K T"]:
    """alpha * (phi . x / rms(x)) + bias for every token, float32 or wider (Eq. 14-16).

    The division by the root mean square of all n*C entries comes after the product, and the bias is not divided.
    """
    x = wide(x.reshape(-1, x.shape[-1]))
    raw = jnp.einsum("kd,td->kt", phi, x, precision=jax.lax.Precision.HIGHEST)
    return alpha * (raw * inverse_rms(x, eps).T) + bias[:, None]


def pre_bias(n: int, sublayer: Int[Array, ""]) -> Float[Array, "n"]:
    """Logits whose sigmoids are PRE_FAVOURED at stream `sublayer` mod n and share the rest evenly."""
    favoured = PRE_FAVOURED
    others = (1 - favoured) / max(n - 1, 1)
    logit = [float(np.log(p / (1 - p))) for p in (favoured, others)]
    return jnp.where(jnp.arange(n) == sublayer % n, logit[0], logit[1])


class MHC(Connection):
    """Manifold-constrained hyper-connections. Rows of phi and entries of bias: n for pre, n for post, n*n for res (row-major)."""

    phi: Float[Array, "n*(n+2) n*C"]
    bias: Float[Array, "n*(n+2)"]
    alpha: Float[Array, "3"]  # gates of pre, post, res

    SPECS: ClassVar = {"phi": Spec((None, "stream_embed"), decay=True), "bias": Spec((None,)), "alpha": Spec((None,))}
    LEARNS_FROM_EQUAL_STREAMS: ClassVar[tuple[bool, ...]] = (False, True, False)

    def __init__(self, config: ModelConfig, sublayer: Int[Array, ""], key: PRNGKeyArray):
        c = config.connections
        n = c.streams
        self.phi = jnp.zeros((n * (n + 2), n * config.dim))
        self.bias = jnp.concatenate([pre_bias(n, sublayer), jnp.zeros(n), c.res_diagonal * jnp.eye(n).reshape(-1)])
        self.alpha = jnp.full(3, c.gate_init, jnp.float32)
        self.streams: int = n
        self.sinkhorn_steps: int = c.sinkhorn_steps
        self.norm_eps: float = config.norm_eps

    @property
    def mapping(self) -> Mapping:
        return Mapping(self.streams, sinkhorn_steps=self.sinkhorn_steps, norm_eps=self.norm_eps)

    def seam(self, pending: Pending, rules: Rules) -> tuple[Float[Array, "B S nC"], Float[Array, "B S C"], Float[Array, "K T"]]:
        (x, y, h), mapping = pending, self.mapping

        def post_pre(x: Array, y: Array, h: Array, *weights: Array) -> tuple[Array, Array, Array]:
            between, u, h_next = mhc_post_pre(flat(x), flat(y), h, Weights(*weights), mapping)
            # Without a barrier XLA for TPU widens u for the sublayer's norm before it is reshaped, writes that, and reads it twice.
            return between.reshape(x.shape), jax.lax.optimization_barrier(u.reshape(y.shape)), h_next

        weights = Weights(phi=self.phi, alpha=self.alpha, bias=self.bias)
        given, results = (STREAMS, STREAMS, TOKENS_LAST, *(None,) * len(weights)), (STREAMS, STREAMS, TOKENS_LAST)
        return on_shards(post_pre, rules, given=given, results=results)(x, y, h, *weights)

    def res_logits(self, x: Float[Array, "B S nC"]) -> Float[Array, "n n T"] | None:
        n = self.streams
        return projected(x, self.phi[2 * n :], self.alpha[2], self.bias[2 * n :], self.norm_eps).reshape(n, n, -1)

    def groups(self) -> dict[str, tuple[int, ...]]:
        n = self.streams
        return {"phi": (n, n, n * n), "bias": (n, n, n * n), "alpha": (1, 1, 1)}


class IdentityHC(MHC):
    """mHC's pre and post with H_res = I: the control that tells what mixing adds. Rows of phi: n for pre, n for post."""

    phi: Float[Array, "2*n n*C"]
    bias: Float[Array, "2*n"]
    alpha: Float[Array, "2"]  # gates of pre, post

    LEARNS_FROM_EQUAL_STREAMS: ClassVar = (False, True)

    def __init__(self, config: ModelConfig, sublayer: Int[Array, ""], key: PRNGKeyArray):
        n = config.connections.streams
        self.phi = jnp.zeros((2 * n, n * config.dim))
        self.bias = jnp.concatenate([pre_bias(n, sublayer), jnp.zeros(n)])
        self.alpha = jnp.full(2, config.connections.gate_init, jnp.float32)
        self.streams: int = n
        self.norm_eps: float = config.norm_eps

    @property
    def mapping(self) -> Mapping:
        return Mapping(self.streams, mixes=False, norm_eps=self.norm_eps)

    def res_logits(self, x: Float[Array, "B S nC"]) -> None:
        return None

    def groups(self) -> dict[str, tuple[int, ...]]:
        n = self.streams
        return {"phi": (n, n), "bias": (n, n), "alpha": (1, 1)}
