"""Experts that devices share: every visit travels to the device that owns its expert, and what it brought travels back.

Device p of the P that share experts owns E / P of them, side by side. A device has room to send each other one a little more than an even
share of its visits in one all-to-all of fixed size. What does not fit follows in further rounds, which cost nothing while there are none:
no visit is dropped, and the result does not depend on the room. The products themselves, and one device's part, are in experts.py.
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from mhc_jax.nn.experts import Rows, collect, combine, dispatch, routed_swiglu, visited
from mhc_jax.parallel.rules import Rules
from mhc_jax.parallel.shards import STREAMS, on_shards, shard_count

ROOM = 1.25  # of an even share of the visits, between each two devices, in one round

OWNED = ("experts", None, None)


def routed(
    x: Float[Array, "B S C"],
    experts: Int[Array, "B S k"],
    weights: Float[Array, "B S k"],
    inner: Float[Array, "E C gate_up"],
    out: Float[Array, "E gate_up//2 C"],
    rules: Rules,
) -> Float[Array, "B S C"]:
    """Sum over a token's k experts of weight * SwiGLU_expert(x), in x's type with a float32 or wider sum.

    Experts are split under the mesh as `rules.experts` says; the rest of their matrices is gathered in x's type for the products.
    """
    shards, axes = shard_count(rules, "experts"), rules.mesh_axes("experts")

    def local(x: Array, experts: Array, weights: Array, inner: Array, out: Array) -> Array:
        tokens, visits, shares = (a.reshape(-1, a.shape[-1]) for a in (x, experts, weights))
        if shards == 1:
            y = routed_swiglu(tokens, visits, shares, inner, out)
        else:
            y = exchanged(tokens, visits, shares, inner, out, _Peers(axes, shards, math.ceil(ROOM * visits.size / shards)))
        return y.reshape(x.shape)

    given = (STREAMS, STREAMS, STREAMS, OWNED, OWNED)
    return on_shards(local, rules, given=given, results=STREAMS)(x, experts, weights, inner.astype(x.dtype), out.astype(x.dtype))


@dataclass(frozen=True)
class _Peers:
    """The devices that share experts with this one, inside `shard_map`."""

    axes: tuple[str, ...]
    count: int  # P
    room: int  # R, visits that one device sends another in a round

    def exchange(self, x: Num[Array, "slots *more"]) -> Num[Array, "slots *more"]:
        """R rows to each peer, and R from each, in the order of the peers."""
        return jax.lax.all_to_all(x, self.axes, split_axis=0, concat_axis=0, tiled=True)

    def rounds(self, experts: Int[Array, "T k"], owned: int) -> Int[Array, ""]:
        """In how many rounds all visits of all devices are made."""
        sent = jnp.bincount(experts.reshape(-1) // owned, length=self.count).max()
        return jax.lax.pmax(-(-sent // self.room), jax.sharding.get_abstract_mesh().axis_names)

    def slots(self, experts: Int[Array, "T k"], owned: int, number: Int[Array, ""] | int) -> Rows:
        """The rows of `exchange` in which visits travel in round `number`: for each owner those that come next in the order of visits."""
        owner, every = experts.reshape(-1) // owned, self.count * self.room
        order = jnp.argsort(owner, stable=True)
        first = jnp.searchsorted(owner[order], jnp.arange(self.count))
        turn = jnp.argsort(order) - first[owner] - number * self.room  # among the visits to this owner in this round
        row = jnp.where((turn >= 0) & (turn < self.room), owner * self.room + turn, every)
        visit = jnp.full(every, owner.size).at[row].set(jnp.arange(owner.size), mode="drop")
        return Rows(visit, row.reshape(experts.shape))


def exchanged(x: Array, experts: Array, weights: Array, inner: Array, out: Array, peers: _Peers) -> Float[Array, "T C"]:
    """`routed_swiglu` for this device's tokens, with this device's experts alone; called by all peers together."""
    # The first round is written plainly, so that its results may be kept for the backward pass; the others are made again there.
    brought = _one_round(x, inner, out, experts, 0, peers) + _further_rounds(x, inner, out, experts, peers)
    return combine(brought, weights)


def _one_round(x: Array, inner: Array, out: Array, experts: Array, number: Array | int, peers: _Peers) -> Float[Array, "T k C"]:
    owned = inner.shape[0]
    slots = peers.slots(experts, owned, number)
    asked = (experts % owned).reshape(-1).at[slots.visit_of_row].get(mode="fill", fill_value=owned)
    came = peers.exchange(dispatch(x, slots))
    y = visited(came, peers.exchange(asked)[:, None], inner, out)[:, 0]
    return collect(peers.exchange(y), slots)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _further_rounds(x: Array, inner: Array, out: Array, experts: Array, peers: _Peers) -> Float[Array, "T k C"]:
    """What the visits bring that had no room in the first round."""
    last = peers.rounds(experts, inner.shape[0])

    def one_more(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        number, brought = carry
        return number + 1, brought + _one_round(x, inner, out, experts, number, peers)

    nothing = jnp.zeros((*experts.shape, x.shape[1]), x.dtype)
    return jax.lax.while_loop(lambda carry: carry[0] < last, one_more, (jnp.ones_like(last), nothing))[1]


def _further_rounds_fwd(x, inner, out, experts, peers):
    return _further_rounds(x, inner, out, experts, peers), (x, inner, out, experts)


def _further_rounds_bwd(peers, saved, g):
    *differentiated, experts = saved
    last = peers.rounds(experts, differentiated[1].shape[0])

    def one_more(carry):
        number, sums = carry
        _, pull = jax.vjp(lambda x, inner, out: _one_round(x, inner, out, experts, number, peers), *differentiated)
        return number + 1, jax.tree.map(jnp.add, sums, pull(g))

    nothing = tuple(map(jnp.zeros_like, differentiated))
    _, sums = jax.lax.while_loop(lambda carry: carry[0] < last, one_more, (jnp.ones_like(last), nothing))
    return *sums, np.zeros(experts.shape, jax.dtypes.float0)


_further_rounds.defvjp(_further_rounds_fwd, _further_rounds_bwd)
