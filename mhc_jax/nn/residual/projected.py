"""Parts that differ from mHC in how H_res is made of its logits, and in nothing else: what they share.

The seam's kernels know no H_res but that of Sinkhorn-Knopp. These parts finish their coefficients themselves, as HC does, and take the
seam that is given finished coefficients (`Connection.seam`): no kernel needs to know them.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from mhc_jax.config import ModelConfig
from mhc_jax.nn.module import Spec
from mhc_jax.nn.residual.mhc import pre_bias, projected
from mhc_jax.nn.residual.socket import Connection
from pallas_kernels.mhc import Mapping


class Projected(Connection):
    """Coefficients predicted from all streams; a subclass says how R logits a token become a doubly stochastic H_res.

    pre and post, and initial values but those of H_res, are mHC's (arXiv 2512.24880, Eq. 7-8; `mhc_jax.nn.residual.mhc`). Rows of phi and
    entries of bias: n for pre, n for post, R for res.
    """

    phi: Float[Array, "2*n+R n*C"]
    bias: Float[Array, "2*n+R"]
    alpha: Float[Array, "3"]  # gates of pre, post, res

    SPECS: ClassVar = {"phi": Spec((None, "stream_embed"), decay=True), "bias": Spec((None,)), "alpha": Spec((None,))}
    LEARNS_FROM_EQUAL_STREAMS: ClassVar = (False, True, False)
    LEARNS_BEFORE_A_SUM: ClassVar = (True, True, False)

    @staticmethod
    def res_bias(n: int) -> Float[Array, "R"]:
        """Initial logits of H_res; their number is R."""
        raise NotImplementedError

    def res(self, logits: Float[Array, "R T"]) -> Float[Array, "n n T"]:
        """H_res of every token, rows and columns summing to one."""
        raise NotImplementedError

    def __init__(self, config: ModelConfig, sublayer: Int[Array, ""], key: PRNGKeyArray):
        n = config.connections.streams
        self.bias = jnp.concatenate([pre_bias(n, sublayer), jnp.zeros(n), self.res_bias(n)])
        self.phi = jnp.zeros((len(self.bias), n * config.dim))
        self.alpha = jnp.full(3, config.connections.gate_init, jnp.float32)
        self.streams: int = n
        self.norm_eps: float = config.norm_eps

    @property
    def mapping(self) -> Mapping:
        return Mapping(self.streams, norm_eps=self.norm_eps)

    def groups(self) -> dict[str, tuple[int, ...]]:
        n, rows = self.streams, self.phi.shape[-2]
        return {"phi": (n, n, rows - 2 * n), "bias": (n, n, rows - 2 * n), "alpha": (1, 1, 1)}

    def coefficients(self, x: Float[Array, "B S nC"]) -> Float[Array, "K T"]:
        n, logits = self.streams, self._logits(x)
        pre, post, res = jax.nn.sigmoid(logits[:n]), 2 * jax.nn.sigmoid(logits[n : 2 * n]), self.res(logits[2 * n :])
        return jnp.concatenate([pre, post, res.reshape(n * n, -1)])

    def res_logits(self, x: Float[Array, "B S nC"]) -> Float[Array, "R T"]:
        return self._logits(x)[2 * self.streams :]

    def _logits(self, x: Float[Array, "B S nC"]) -> Float[Array, "K T"]:
        gate = jnp.repeat(self.alpha, np.array(self.groups()["bias"]), total_repeat_length=len(self.bias))
        return projected(x, self.phi, gate[:, None], self.bias, self.norm_eps)
