"""Next-token cross-entropy that never holds the logits of all tokens at once."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mhc_jax.nn.norm import wide

IGNORED = -1  # target of a position that has no next token in its document


def next_token_loss(
    hidden: Float[Array, "B S C"], unembed: Float[Array, "C V"], targets: Int[Array, "B S"], chunk: int
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Summed cross-entropy in nats over positions whose target is not IGNORED, and their number.

    Logits, float32 or wider, exist for `chunk` positions of each sequence at a time; the backward pass computes them again.
    """
    batch, length, _ = hidden.shape
    chunk = min(chunk, length)
    pad = -length % chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, pad)), constant_values=IGNORED)
    pieces = (
        hidden.reshape(batch, -1, chunk, hidden.shape[-1]).swapaxes(0, 1),
        targets.reshape(batch, -1, chunk).swapaxes(0, 1),
    )

    @jax.checkpoint
    def of_piece(hidden, targets, unembed):
        logits = wide(jnp.matmul(hidden, unembed.astype(hidden.dtype), preferred_element_type=wide(hidden[:0]).dtype))
        valid = targets != IGNORED
        own = jnp.take_along_axis(logits, jnp.where(valid, targets, 0)[..., None], axis=-1)[..., 0]
        return jnp.where(valid, jax.nn.logsumexp(logits, axis=-1) - own, 0).sum()

    def step(total, piece):
        return total + of_piece(*piece, unembed), None

    total, _ = jax.lax.scan(step, jnp.zeros((), wide(hidden[:0]).dtype), pieces)
    return total, (targets != IGNORED).sum()
