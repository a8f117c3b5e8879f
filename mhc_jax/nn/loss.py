"""Next-token cross-entropy that never holds the logits of all tokens at once."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mhc_jax.nn.norm import wide_dtype


def next_token_loss(
    hidden: Float[Array, "B S C"], unembed: Float[Array, "C V"], targets: Int[Array, "B S"], chunk: int, parts: int = 1
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Summed cross-entropy in nats over positions with a target, and their number. A negative target is none.

    Logits, float32 or wider, exist for `chunk` positions at a time of each of `parts` equal parts of each sequence, which are those that
    devices hold where sequences are split.
    """
    return _summed_loss(hidden, unembed, targets, min(chunk, hidden.shape[1] // parts), parts), (targets >= 0).sum()


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _summed_loss(hidden, unembed, targets, chunk, parts):
    def step(total, piece):
        h, t = piece
        return total + _of_piece(h, t, unembed)[0], None

    total, _ = jax.lax.scan(step, _zero(hidden), _pieces(hidden, targets, chunk, parts))
    return total


# The loss is the last thing that a forward pass computes, so its gradient is computed on the spot, while a piece's logits exist, instead
# of computing them a second time in the backward pass. It is scaled by the incoming cotangent there.


def _summed_loss_fwd(hidden, unembed, targets, chunk, parts):
    def step(carry, piece):
        total, d_unembed = carry
        h, t = piece
        loss, d_logits = _of_piece(h, t, unembed)
        d_hidden = jnp.einsum("bsv,cv->bsc", d_logits, unembed.astype(h.dtype))
        d_unembed += jnp.einsum("bsc,bsv->cv", h, d_logits, preferred_element_type=d_unembed.dtype)
        return (total + loss, d_unembed), d_hidden

    (total, d_unembed), d_hidden = jax.lax.scan(step, (_zero(hidden), jnp.zeros_like(unembed)), _pieces(hidden, targets, chunk, parts))
    d_hidden = _whole(d_hidden, hidden.shape[1], parts)
    return total, (d_hidden, d_unembed)


def _summed_loss_bwd(chunk, parts, saved, g):
    d_hidden, d_unembed = saved
    targets = np.zeros(d_hidden.shape[:2], jax.dtypes.float0)
    return (g * d_hidden).astype(d_hidden.dtype), g * d_unembed, targets


_summed_loss.defvjp(_summed_loss_fwd, _summed_loss_bwd)


def _of_piece(hidden: Float[Array, "B s C"], targets: Int[Array, "B s"], unembed: Float[Array, "C V"]):
    """Summed loss of a piece, and its gradient with respect to the logits in the compute dtype."""
    logits = jnp.matmul(hidden, unembed.astype(hidden.dtype), preferred_element_type=wide_dtype(hidden))
    valid = (targets >= 0)[..., None]
    own = jnp.arange(logits.shape[-1])[None, None] == targets[..., None]
    log_total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    loss = jnp.where(valid, log_total - jnp.where(own, logits, 0).sum(axis=-1, keepdims=True), 0).sum()
    d_logits = jnp.where(valid, jnp.exp(logits - log_total) - own, 0).astype(hidden.dtype)
    return loss, d_logits


def _pieces(hidden, targets, chunk, parts):
    """Chunks of positions of all parts along a new leading axis; a part's last one is filled up with positions that have no target."""

    def cut(x, value):
        x = x.reshape(x.shape[0], parts, -1, *x.shape[2:])
        x = jnp.pad(x, [(0, -x.shape[2] % chunk if axis == 2 else 0) for axis in range(x.ndim)], constant_values=value)
        x = jnp.moveaxis(x.reshape(*x.shape[:2], -1, chunk, *x.shape[3:]), 2, 0)
        return x.reshape(*x.shape[:2], -1, *x.shape[4:])  # [pieces, B, parts * chunk, ...]

    return cut(hidden, 0), cut(targets, -1)


def _whole(pieces, length, parts):
    """[B, S, ...] again of what `_pieces` cut."""
    x = pieces.reshape(*pieces.shape[:2], parts, -1, *pieces.shape[3:])
    x = jnp.moveaxis(x, 0, 2)
    x = x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :, : length // parts]
    return x.reshape(x.shape[0], length, *x.shape[3:])


def _zero(hidden):
    return jnp.zeros((), wide_dtype(hidden))
