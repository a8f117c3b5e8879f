"""Sparse attention over all queries, a chunk at a time, and its gradients. What one chunk's attention is, the implementations say.

Absorbed queries q~ = q_nope . key_up and their gradients exist of one chunk only. Kept for the backward pass are the arguments, `out` and
`log_total`. The gradients of latents and projections are summed over chunks in float32, in the order of the queries.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.choose import Kernels
from pallas_kernels.sparse_attention.spec import TPU_QUERIES, Keys, SparseAttended, Weights, accumulator_rows, wide_type, xla_chunk
from pallas_kernels.visible import PAGE

Array = jax.Array
Carry = TypeVar("Carry")


class Plan(NamedTuple):
    """What is fixed when sparse attention is traced."""

    scale: float
    pages: bool
    chunk: int  # queries
    padding: int  # the queries of a chunk are filled up to a multiple of this
    kernels: Kernels

    @property
    def by_rows(self) -> bool:
        """Whether the kernels take latents, and add up their gradients, in a form of their own, so that single rows can be moved."""
        return self.kernels.name == "tpu" and not self.pages


def plan_of(
    kernels: Kernels, q_rope: Array, latent: Array, chosen: int, *, scale: float, pages: bool, query_chunk: int, backward: bool = False
) -> Plan:
    """The plan of one direction, for so many tokens or pages of every query."""
    batch, length, heads, _ = q_rope.shape
    if backward and kernels.name == "tpu" and not pages:
        query_chunk = min(query_chunk, max(1, TPU_QUERIES // batch))
    if kernels.name == "xla":
        keys = chosen * PAGE if pages else chosen
        query_chunk = min(query_chunk, xla_chunk(batch, heads, keys, latent.shape[-1], latent.dtype.itemsize, pages))
    padding = PAGE if pages and (length > PAGE or kernels.name != "xla") else 1
    return Plan(scale, pages, min(-(-query_chunk // padding) * padding, length), padding, kernels)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend(plan: Plan, plan_backward: Plan, q_nope: Array, q_rope: Array, weights: Weights, latent: Array, keys: Keys) -> SparseAttended:
    """`api.sparse_mla` with everything decided."""
    return attend_forward(plan, q_nope, q_rope, weights, latent, keys)


def attend_forward(plan: Plan, q_nope: Array, q_rope: Array, weights: Weights, latent: Array, keys: Keys) -> SparseAttended:
    """The forward pass."""

    rank, kernels = weights.key_up.shape[0], plan.kernels
    rows = kernels.packed(latent, rank) if plan.by_rows else latent

    def chunk(start: Array | int, size: int, done: SparseAttended) -> SparseAttended:
        q, chosen = _prepared(plan, start, size, q_nope, q_rope, weights, latent, keys)
        if plan.pages:
            o, log_total, top = kernels.attend_pages(q, rows, *chosen, rank=rank, scale=plan.scale)
        else:
            o, log_total, top = kernels.attend_tokens(q, rows, chosen.index, chosen.count, rank=rank, scale=plan.scale)
        out = _product("bshk,khv->bshv", o, weights.value_up, q_nope.dtype)
        return SparseAttended(*(_put(whole, part[:, :size], start) for whole, part in zip(done, (out, log_total, top))))

    batch, length, heads = q_nope.shape[:3]
    wide = wide_type(q_nope)
    sums = jnp.zeros((batch, length, heads), wide)
    done = SparseAttended(jnp.zeros((batch, length, heads, weights.value_up.shape[-1]), q_nope.dtype), sums, sums)
    return _each_chunk(chunk, done, length, plan.chunk)


def attend_backward(
    plan: Plan, q_nope: Array, q_rope: Array, weights: Weights, latent: Array, keys: Keys, out: Array, log_total: Array, d_out: Array
) -> tuple[Array, Array, Weights, Array]:
    """Gradients for q_nope, q_rope, weights and latent, from what the forward pass took and returned."""
    rank, (batch, length, width), kernels = weights.key_up.shape[0], latent.shape, plan.kernels
    wide = wide_type(q_nope)
    rows = kernels.packed(latent, rank) if plan.by_rows else latent

    def chunk(start: Array | int, size: int, done: Any) -> Any:
        d_nope, d_rope, d_key_up, d_value_up, d_latent = done
        q, chosen = _prepared(plan, start, size, q_nope, q_rope, weights, latent, keys)
        nope, d, o, total = (_padded(_take(x, start, size), plan.padding) for x in (q_nope, d_out, out, log_total))
        own = jnp.sum(d.astype(wide) * o.astype(wide), axis=-1)  # sum over keys of p dp, as the output knows it
        d_o = _product("bshv,khv->bshk", d, weights.value_up, latent.dtype)
        rest = (total, own, d_o, d_latent)
        if plan.pages:
            d_q, o, d_latent = kernels.attend_pages_backward(q, latent, *chosen, *rest, scale=plan.scale)
        else:
            d_q, o, d_latent = kernels.attend_tokens_backward(q, rows, chosen.index, chosen.count, *rest, scale=plan.scale)
        d_absorbed = d_q[..., :rank]
        d_key_up += _product("bshd,bshk->khd", nope, d_absorbed, wide)
        d_value_up += _product("bshk,bshv->khv", o, d, wide)
        d_nope = _put(d_nope, _product("bshk,khd->bshd", d_absorbed, weights.key_up, nope.dtype)[:, :size], start)
        d_rope = _put(d_rope, d_q[:, :size, :, rank:], start)
        return d_nope, d_rope, d_key_up, d_value_up, d_latent

    zeros = (
        jnp.zeros_like(q_nope),
        jnp.zeros_like(q_rope),
        *(jnp.zeros(x.shape, wide) for x in weights),
        kernels.sum_of(latent) if plan.by_rows else jnp.zeros((batch, accumulator_rows(length, kernels.name), width), wide),
    )
    d_nope, d_rope, d_key_up, d_value_up, d_latent = _each_chunk(chunk, zeros, q_nope.shape[1], plan.chunk)
    d_weights = Weights(d_key_up.astype(weights.key_up.dtype), d_value_up.astype(weights.value_up.dtype))
    d_latent = kernels.gradient_of(d_latent, latent) if plan.by_rows else d_latent[:, :length]
    return d_nope, d_rope, d_weights, d_latent.astype(latent.dtype)


def _attend_fwd(plan, plan_backward, q_nope, q_rope, weights, latent, keys):
    attended = attend(plan, plan_backward, q_nope, q_rope, weights, latent, keys)
    attended = attended._replace(out=checkpoint_name(attended.out, "attention"), log_total=checkpoint_name(attended.log_total, "attention"))
    return attended, (q_nope, q_rope, weights, latent, keys, attended.out, attended.log_total)


def _attend_bwd(plan, plan_backward, kept, cotangents):
    q_nope, q_rope, weights, latent, keys, out, log_total = kept
    d_out = cotangents.out  # what else was returned has no gradient
    gradients = attend_backward(plan_backward, q_nope, q_rope, weights, latent, keys, out, log_total, d_out)
    return *gradients, jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), keys)


attend.defvjp(_attend_fwd, _attend_bwd)


def _prepared(
    plan: Plan, start: Array | int, size: int, q_nope: Array, q_rope: Array, weights: Weights, latent: Array, keys: Keys
) -> tuple[Array, Keys]:
    """Absorbed queries [B, C, H, K+R] of a chunk, and its keys. Queries that only fill it up see no key."""
    q = _product("bshd,khd->bshk", _take(q_nope, start, size), weights.key_up, latent.dtype)
    q = jnp.concatenate([q, _take(q_rope, start, size).astype(latent.dtype)], axis=-1)
    if plan.pages:
        of_pages = tuple(_take(x, start // PAGE, -(-size // PAGE)) for x in (keys.index, keys.count))
    else:
        of_pages = tuple(_padded(_take(x, start, size), plan.padding) for x in (keys.index, keys.count))
    spans = (_padded(_take(x, start, size), plan.padding) for x in (keys.first, keys.stop))
    return _padded(q, plan.padding), Keys(*of_pages, *spans)


def _each_chunk(chunk: Callable[[Array | int, int, Carry], Carry], carry: Carry, length: int, size: int) -> Carry:
    """Runs chunk(start, size, carry) over the queries in order; the last may be shorter."""
    whole, rest = divmod(length, size)
    if whole == 1:
        carry = chunk(0, size, carry)
    elif whole:
        carry = jax.lax.fori_loop(0, whole, lambda i, carry: chunk(i * size, size, carry), carry)
    return chunk(whole * size, rest, carry) if rest else carry


def _take(x: Array, start: Array | int, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)


def _put(whole: Array, part: Array, start: Array | int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(whole, part.astype(whole.dtype), start, axis=1)


def _padded(x: Array, multiple: int) -> Array:
    """Zeros appended to axis 1: queries that see no key, whose gradients are zero."""
    missing = -x.shape[1] % multiple
    return jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2))) if missing else x


def _product(formula: str, x: Array, y: Array, dtype: jax.typing.DTypeLike) -> Array:
    """An einsum summed in float32 or wider."""
    return jnp.einsum(formula, x, y, preferred_element_type=wide_type(x)).astype(dtype)
