"""What a stage of sparse attention trains (arXiv 2512.02556, section 2.1): everything, or the indexer alone; and each clipped by itself.

The indexer learns from its own loss and the rest from the others', so their gradients share no parameter. They are clipped apart: a joint
norm would let one hold back the other.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from mhc_jax.config import Config, ModelConfig
from mhc_jax.nn.decoder import Decoder


def only_indexer(config: ModelConfig) -> bool:
    """Whether everything but the indexer is frozen."""
    return config.attention.sparse is not None and config.attention.sparse.stage == "warmup"


def of_indexer(model: Any) -> Any:
    """A pytree like the model, or like its gradients: True in the place of the indexer's parameters."""
    return jax.tree_util.tree_map_with_path(lambda path, _: any(getattr(key, "name", None) == "indexer" for key in path), model)


class Clip(NamedTuple):
    """Global norms before clipping and the factors that gradients are to be multiplied by; None for an indexer that is not there."""

    norm: Float[Array, ""]  # of everything but the indexer
    scale: Float[Array, ""]
    indexer_norm: Float[Array, ""] | None
    indexer_scale: Float[Array, ""] | None

    @property
    def finite(self) -> Array:
        """Whether every gradient is."""
        return jnp.isfinite(self.norm) & (True if self.indexer_norm is None else jnp.isfinite(self.indexer_norm))

    @property
    def clipped(self) -> Float[Array, ""]:
        """1 where either was too long, else 0."""
        scales = [scale for scale in (self.scale, self.indexer_scale) if scale is not None]
        return jnp.stack([scale < 1 for scale in scales]).any().astype(jnp.float32)

    def of_model(self, grads: Decoder) -> Decoder:
        """The clipped gradients."""
        if self.indexer_scale is None:
            return jax.tree.map(lambda g: g * self.scale, grads)
        return jax.tree.map(lambda g, own: g * (self.indexer_scale if own else self.scale), grads, of_indexer(grads))


def clip(grads: Decoder, others: Any, config: Config) -> Clip:
    """`others` are gradients beside the model's: of what was read from tables."""
    limit = config.optimizer.clip_norm

    def scale(norm: Array) -> Array:
        return jnp.minimum(1.0, limit / jnp.maximum(norm, limit))

    if config.model.attention.sparse is None:
        norm = optax.tree.norm((grads, others))
        return Clip(norm, scale(norm), None, None)
    leaves, own = jax.tree.leaves(grads), jax.tree.leaves(of_indexer(grads))
    norm = optax.tree.norm(([g for g, indexer in zip(leaves, own) if not indexer], others))
    indexer_norm = optax.tree.norm([g for g, indexer in zip(leaves, own) if indexer])
    return Clip(norm, scale(norm), indexer_norm, scale(indexer_norm))
