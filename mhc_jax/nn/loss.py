"""Next-token cross-entropy that never holds the logits of all tokens at once."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mhc_jax.nn.norm import wide_dtype
from mhc_jax.parallel.rules import Rules
from mhc_jax.parallel.shards import axes_here, on_shards

Axes = tuple[str, ...]  # of the mesh


def next_token_loss(
    hidden: Float[Array, "B S C"], unembed: Float[Array, "C V"], targets: Int[Array, "B S"], chunk: int, rules: Rules = Rules()
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Summed cross-entropy in nats over positions with a target, and their number. A negative target is none.

    Logits, float32 or wider, exist for `chunk` positions of each sequence on a device at a time, and there for its part of the vocabulary.
    The gradient of `unembed` is summed over a device's positions before devices exchange it.
    """
    across, vocab = axes_here(rules, "embed"), axes_here(rules, "vocab")

    def local(hidden: Array, unembed: Array, targets: Array) -> Array:
        return _summed_loss(hidden, unembed, targets, min(chunk, hidden.shape[1]), across, vocab)[None, None]

    where = ("batch", "positions")
    losses = on_shards(local, rules, given=((*where, None), ("embed", "vocab"), where), results=where)(hidden, unembed, targets)
    return losses.sum(), (targets >= 0).sum()


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _summed_loss(hidden, unembed, targets, chunk, across: Axes, vocab: Axes):
    whole = _gathered(unembed.astype(hidden.dtype), across)

    def step(total, piece):
        h, t = piece
        return total + _of_piece(h, t, whole, vocab)[0], None

    total, _ = jax.lax.scan(step, _zero(hidden), _pieces(hidden, targets, chunk))
    return total


# The loss is the last thing that a forward pass computes, so its gradient is computed on the spot, while a piece's logits exist, instead
# of computing them a second time in the backward pass. It is scaled by the incoming cotangent there.


def _summed_loss_fwd(hidden, unembed, targets, chunk, across, vocab):
    whole = _gathered(unembed.astype(hidden.dtype), across)

    def step(carry, piece):
        total, d_unembed = carry
        h, t = piece
        loss, d_logits = _of_piece(h, t, whole, vocab)
        d_hidden = jnp.einsum("bsv,cv->bsc", d_logits, whole)
        d_unembed += jnp.einsum("bsc,bsv->cv", h, d_logits, preferred_element_type=d_unembed.dtype)
        return (total + loss, d_unembed), d_hidden

    zeros = jnp.zeros(whole.shape, unembed.dtype)
    (total, d_unembed), d_hidden = jax.lax.scan(step, (_zero(hidden), zeros), _pieces(hidden, targets, chunk))
    d_hidden = d_hidden.swapaxes(0, 1).reshape(hidden.shape[0], -1, hidden.shape[2])[:, : hidden.shape[1]]
    if across:
        d_unembed = jax.lax.psum_scatter(d_unembed, across, scatter_dimension=0, tiled=True)
    return total, (d_hidden, d_unembed)


def _summed_loss_bwd(chunk, across, vocab, saved, g):
    d_hidden, d_unembed = saved
    if vocab:  # devices that share the vocabulary have computed one loss together, and each is given its share of the cotangent
        g = jax.lax.psum(g, vocab)
    targets = np.zeros(d_hidden.shape[:2], jax.dtypes.float0)
    return (g * d_hidden).astype(d_hidden.dtype), g * d_unembed, targets


_summed_loss.defvjp(_summed_loss_fwd, _summed_loss_bwd)


def _of_piece(hidden: Float[Array, "B s C"], targets: Int[Array, "B s"], unembed: Float[Array, "C V"], vocab: Axes):
    """Summed loss of a piece, and its gradient with respect to the logits of this part of the vocabulary, in the compute dtype."""
    logits = jnp.matmul(hidden, unembed, preferred_element_type=wide_dtype(hidden))
    valid = (targets >= 0)[..., None]
    first = jax.lax.axis_index(vocab) * logits.shape[-1] if vocab else 0
    own = jnp.arange(logits.shape[-1])[None, None] == targets[..., None] - first
    log_total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    of_target = jnp.where(own, logits, 0).sum(axis=-1, keepdims=True)
    if vocab:
        log_total = jax.nn.logsumexp(jax.lax.all_gather(log_total, vocab), axis=0)
        of_target = jax.lax.psum(of_target, vocab)
    loss = jnp.where(valid, log_total - of_target, 0).sum()
    d_logits = jnp.where(valid, jnp.exp(logits - log_total) - own, 0).astype(hidden.dtype)
    return loss, d_logits


def _gathered(unembed: Float[Array, "c V"], across: Axes) -> Float[Array, "C V"]:
    return jax.lax.all_gather(unembed, across, axis=0, tiled=True) if across else unembed


def _pieces(hidden, targets, chunk):
    """Chunks of positions along a new leading axis; the last one is filled up with positions that have no target."""
    batch, length, width = hidden.shape
    fill = -length % chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, fill), (0, 0))).reshape(batch, -1, chunk, width).swapaxes(0, 1)
    targets = jnp.pad(targets, ((0, 0), (0, fill)), constant_values=-1).reshape(batch, -1, chunk).swapaxes(0, 1)
    return hidden, targets


def _zero(hidden):
    return jnp.zeros((), wide_dtype(hidden))
