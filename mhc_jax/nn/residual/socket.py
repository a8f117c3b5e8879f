"""The residual socket: what a part provides so that it can join sublayers.

A sublayer's output is not written at once: it stays pending, and the next connection's seam writes it and reads its own input in one go,
because the two together move far fewer bytes than each alone.

Another part is a subclass of `Connection` with its parameters, `mapping`, `coefficients` and `groups`; `kinds.register` gives it a name.
docs/add_a_residual_part.md shows one.
"""

from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from mhc_jax.config import ModelConfig
from mhc_jax.nn.module import Module
from mhc_jax.nn.residual.streams import Pending, collapse, flat
from mhc_jax.parallel.rules import Rules
from mhc_jax.parallel.shards import STREAMS, TOKENS_LAST, on_shards
from pallas_kernels.mhc import Mapping, mhc_post


class Connection(Module):
    """The connection around one sublayer."""

    # Whether each mapping (pre, post, res) has a gradient while all streams are equal copies, as they are at the first sublayer of the
    # network. Where it has none, what comes out is rounding noise, which Adam with a tiny epsilon would turn into full steps.
    LEARNS_FROM_EQUAL_STREAMS: ClassVar[tuple[bool, ...]] = ()
    # The same at the last sublayer where the network ends in a mean or sum of the streams, which sees nothing of H_res but its column sums.
    LEARNS_BEFORE_A_SUM: ClassVar[tuple[bool, ...]] = ()

    def __init__(self, config: ModelConfig, sublayer: Int[Array, ""], key: PRNGKeyArray):
        """Initial parameters of sublayer 0, 1, ... of the network; called under `jax.vmap` to make a stack of layers."""
        raise NotImplementedError

    @property
    def mapping(self) -> Mapping | None:
        """How its coefficients are packed; None for the plain residual."""
        raise NotImplementedError

    def coefficients(self, x: Float[Array, "B S nC"]) -> Float[Array, "K T"]:
        """The mappings for every token, packed, float32 or wider."""
        raise NotImplementedError

    def res_logits(self, x: Float[Array, "B S nC"]) -> Float[Array, "*R T"] | None:
        """Logits that H_res is made of, where there are such."""
        return None

    def seam(self, pending: Pending, rules: Rules) -> tuple[Float[Array, "B S nC"], Float[Array, "B S C"], Float[Array, "K T"] | None]:
        """Writes what is pending, and returns the streams, the sublayer's input and the coefficients that will write its output."""
        assert self.mapping is not None
        n = self.mapping.n

        def read(own: "Connection", x: Array) -> tuple[Array, Array]:
            h = own.coefficients(x)
            return collapse(x, h[:n]), h

        x = self.written(pending, rules)
        return x, *on_shards(read, rules, given=(None, STREAMS), results=(STREAMS, TOKENS_LAST))(self, x)

    def written(self, pending: Pending, rules: Rules) -> Float[Array, "B S nC"]:
        """Writes what is pending: the streams after the sublayer."""
        x, y, h = pending
        mapping = self.mapping
        assert mapping is not None

        def post(x: Array, y: Array, h: Array) -> Array:
            return mhc_post(flat(x), flat(y), h, mapping).reshape(x.shape)

        return on_shards(post, rules, given=(STREAMS, STREAMS, TOKENS_LAST), results=STREAMS)(x, y, h)

    def groups(self) -> dict[str, tuple[int, ...]]:
        """How axis 0 of each parameter divides into pre, post and res."""
        raise NotImplementedError

    def update_mask(self, learns: Float[np.ndarray, "L 3"]) -> dict[str, Float[Array, "L _"]]:
        """1 where a parameter of the L stacked sublayers may be updated; `learns` says so of their pre, post and res."""
        sizes = self.groups().items()
        return {name: jnp.asarray(np.repeat(learns[:, : len(own)], own, axis=1), jnp.float32) for name, own in sizes}


class PlainResidual(Connection):
    """x + F(x): one stream, no parameters."""

    def __init__(self, config: ModelConfig, sublayer: Int[Array, ""], key: PRNGKeyArray):
        pass

    @property
    def mapping(self) -> None:
        return None

    def seam(self, pending: Pending, rules: Rules) -> tuple[Float[Array, "B S C"], Float[Array, "B S C"], None]:
        x = self.written(pending, rules)
        return x, x, None

    def written(self, pending: Pending, rules: Rules) -> Float[Array, "B S C"]:
        return pending.x + pending.y

    def groups(self) -> dict[str, tuple[int, ...]]:
        return {}
