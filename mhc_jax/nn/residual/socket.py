"""The residual socket: what a part provides so that it can join sublayers.

A third part is a subclass of `Connection` with its parameters, `coefficients` and `groups`, and a line in `mhc_jax.nn.decoder.CONNECTIONS`.
"""

from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from mhc_jax.config import ModelConfig
from mhc_jax.nn.module import Module
from mhc_jax.nn.residual.streams import Coefficients


class Connection(Module):
    """The connection around one sublayer."""

    streams: int

    # Whether each mapping (pre, post, res) has a gradient while all streams are equal copies, as they are at the first sublayer of the
    # network. Where it has none, what comes out is rounding noise, which Adam with a tiny epsilon would turn into full steps.
    LEARNS_FROM_EQUAL_STREAMS: ClassVar[tuple[bool, ...]] = ()

    def __init__(self, config: ModelConfig, sublayer: Int[Array, ""], key: PRNGKeyArray):
        """Initial parameters of sublayer 0, 1, ... of the network; called under `jax.vmap` to make a stack of layers."""
        raise NotImplementedError

    def coefficients(self, x: Float[Array, "B S nC"]) -> Coefficients:
        """The mappings for every token, float32 or wider."""
        raise NotImplementedError

    def groups(self) -> dict[str, tuple[int, ...]]:
        """How axis 0 of each parameter divides into the mappings of LEARNS_FROM_EQUAL_STREAMS."""
        raise NotImplementedError

    def update_mask(self, first: Bool[Array, "L"]) -> dict[str, Float[Array, "L _"]]:
        """1 where a parameter of the L stacked sublayers may be updated, 0 at the first sublayer's mappings that cannot learn."""
        masks = {}
        for name, sizes in self.groups().items():
            learns = np.repeat(self.LEARNS_FROM_EQUAL_STREAMS, sizes)
            masks[name] = jnp.where(first[:, None], jnp.asarray(learns, jnp.float32), 1.0)
        return masks


class PlainResidual(Connection):
    """x + F(x): one stream, no parameters."""

    def __init__(self, config: ModelConfig, sublayer: Int[Array, ""], key: PRNGKeyArray):
        self.streams = 1

    def coefficients(self, x: Float[Array, "B S C"]) -> Coefficients:
        return Coefficients(None, None, None)

    def groups(self) -> dict[str, tuple[int, ...]]:
        return {}
