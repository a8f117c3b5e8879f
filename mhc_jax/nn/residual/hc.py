"""Hyper-Connections, unconstrained: the dynamic form and the static one.

Sources: the dynamic form as arXiv 2512.24880, Eq. 5, restates it; initial values of arXiv 2409.19606, Eq. 14 (theta 0, pre one-hot on
stream k mod n, post ones, H_res identity), which make the network exactly the pre-norm residual network at step 0. That paper also scales
the initial output projections by sqrt(n); it is left out here, so that the parameters which all residual kinds share start equal.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from mhc_jax.config import ModelConfig
from mhc_jax.nn.module import Spec
from mhc_jax.nn.norm import rms_norm, wide
from mhc_jax.nn.residual.socket import Connection
from pallas_kernels.mhc import Mapping


def initial_bias(n: int, sublayer: Int[Array, ""]) -> Float[Array, "{n}*({n}+2)"]:
    """pre one-hot, post ones, H_res identity, in that order."""
    return jnp.concatenate([jax.nn.one_hot(sublayer % n, n), jnp.ones(n), jnp.eye(n).reshape(-1)])


class StaticHC(Connection):
    """Learned constants for every sublayer. Entries of bias: n for pre, n for post, n*n for res (row-major)."""

    bias: Float[Array, "n*(n+2)"]

    SPECS: ClassVar = {"bias": Spec((None,))}
    LEARNS_FROM_EQUAL_STREAMS: ClassVar = (False, True, True)

    def __init__(self, config: ModelConfig, sublayer: Int[Array, ""], key: PRNGKeyArray):
        n = config.connections.streams
        self.bias = initial_bias(n, sublayer)
        self.streams: int = n

    @property
    def mapping(self) -> Mapping:
        return Mapping(self.streams)

    def groups(self) -> dict[str, tuple[int, ...]]:
        n = self.streams
        return {"bias": (n, n, n * n)}

    def coefficients(self, x: Float[Array, "B S nC"]) -> Float[Array, "K T"]:
        return jnp.broadcast_to(self.bias[:, None], (len(self.bias), x.shape[0] * x.shape[1]))


class HC(Connection):
    """Dynamic hyper-connections: each stream predicts its own column of the coefficients.

    Rows of theta: 1 for pre, 1 for post, n for res. Entries of bias as in `StaticHC`.
    """

    theta: Float[Array, "n+2 C"]
    bias: Float[Array, "n*(n+2)"]
    alpha: Float[Array, "3"]  # gates of pre, post, res

    SPECS: ClassVar = {"theta": Spec((None, "embed"), decay=True), "bias": Spec((None,)), "alpha": Spec((None,))}
    LEARNS_FROM_EQUAL_STREAMS: ClassVar = (False, True, True)

    def __init__(self, config: ModelConfig, sublayer: Int[Array, ""], key: PRNGKeyArray):
        n = config.connections.streams
        self.theta = jnp.zeros((n + 2, config.dim))
        self.bias = initial_bias(n, sublayer)
        self.alpha = jnp.full(3, config.connections.gate_init, jnp.float32)
        self.streams: int = n
        self.norm_eps: float = config.norm_eps

    @property
    def mapping(self) -> Mapping:
        return Mapping(self.streams)

    def groups(self) -> dict[str, tuple[int, ...]]:
        n = self.streams
        return {"theta": (1, 1, n), "bias": (n, n, n * n), "alpha": (1, 1, 1)}

    def coefficients(self, x: Float[Array, "B S nC"]) -> Float[Array, "K T"]:
        n = self.streams
        streams = wide(x.reshape(-1, n, x.shape[-1] // n))
        normed = rms_norm(streams, None, self.norm_eps)
        raw = jnp.einsum("kc,tjc->kjt", self.theta, normed, precision=jax.lax.Precision.HIGHEST)
        gate = jnp.repeat(self.alpha, np.array([1, 1, n]), total_repeat_length=n + 2)
        out = gate[:, None, None] * jnp.tanh(raw) + self.bias.reshape(n + 2, n, 1)
        return out.reshape(n * (n + 2), -1)  # entry [k, j]: k = 0 is pre of stream j, 1 post, 2 + i row i of res
