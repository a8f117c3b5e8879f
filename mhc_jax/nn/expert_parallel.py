"""Experts that devices share: every visit travels to the device that owns its expert, and what it brought travels back.

Device p of the P that share experts owns E / P of them, side by side, so that routing to few groups of experts is routing to few devices
that lie side by side. A round is one exchange into room of fixed size, a little more than balanced routing needs; what finds no room there
follows in further rounds, which cost nothing while there are none. No visit is dropped, and the result does not depend on the room.

    Padded   all-to-all of equal parts, filled up (CPU, GPU)
    Ragged   each part as long as it is (TPU): a quarter fewer bytes, and one room for all peers together

The products are in experts.py.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mhc_jax.nn.experts import Rows, collect, dispatch, routed_swiglu, spread, summed, visited
from mhc_jax.parallel.rules import Rules
from mhc_jax.parallel.shards import STREAMS, axes_here, on_shards, shard_count

ROOM = 1.25  # of what a device sends and gets where all experts are visited alike, in one round

# Scopes by which a plan knows what even routing makes of arrays whose sizes are those of the room.
FIRST_ROUND = "first_round"
FURTHER_ROUNDS = "further_rounds"  # not entered where experts are visited alike


def routed(
    x: Float[Array, "B S C"],
    experts: Int[Array, "B S k"],
    weights: Float[Array, "B S k"],
    inner: Float[Array, "E C gate_up"],
    out: Float[Array, "E gate_up//2 C"],
    rules: Rules,
) -> Float[Array, "B S C"]:
    """Sum over a token's k experts of weight * SwiGLU_expert(x), in x's type with a float32 or wider sum.

    Experts are split under the mesh as `rules.experts` says; the rest of their matrices is gathered in x's type for the products, and their
    gradients are summed into the parts again. Both are written out: the partitioner would sum whole matrices, twice the bytes.
    """
    peers = Peers(rules.mesh_axes("experts"), shard_count(rules, "experts"))
    across = axes_here(rules, "embed")

    def whole(matrices: Array, axis: int) -> Array:
        return jax.lax.all_gather(matrices, across, axis=axis, tiled=True) if across else matrices

    def local(x: Array, experts: Array, weights: Array, inner: Array, out: Array) -> Array:
        given = (*(a.reshape(-1, a.shape[-1]) for a in (x, experts, weights)), whole(inner, 1), whole(out, 2))
        if peers.number == 1:
            return routed_swiglu(*given).reshape(x.shape)
        ways = {name: partial(exchanged, peers=peers, way=way) for name, way in (("tpu", Ragged), ("default", Padded))}
        return jax.lax.platform_dependent(*given, **ways).reshape(x.shape)

    given = (STREAMS, STREAMS, STREAMS, ("experts", "embed", None), ("experts", None, "embed"))
    return on_shards(local, rules, given=given, results=STREAMS)(x, experts, weights, inner.astype(x.dtype), out.astype(x.dtype))


class Peers(NamedTuple):
    """The devices that share experts with this one, inside `shard_map`."""

    axes: tuple[str, ...]
    number: int  # P


class Trip(NamedTuple):
    """One round there and back; R rows arrive."""

    experts: Int[Array, "R"]  # which of its own experts each row that arrived visits; E / P: none
    there: Callable[[Float[Array, "T C"]], Float[Array, "R C"]]
    weights: Callable[[Float[Array, "T k"]], Float[Array, "R"]]
    back: Callable[[Float[Array, "R C"]], Float[Array, "T k C"]]  # zeros for visits that did not travel in this round


class Way:
    """How the visits of this device travel."""

    def __init__(self, experts: Int[Array, "T k"], owned: int, peers: Peers):
        """Of visits to these experts, where every device owns `owned`."""
        self.experts, self.owned, self.peers = experts, owned, peers

    @property
    def rounds(self) -> Int[Array, ""]:
        """In how many rounds all visits of all devices are made."""
        raise NotImplementedError

    def trip(self, number: Int[Array, ""] | int) -> Trip:
        """Round `number`, from 0."""
        raise NotImplementedError


class Padded(Way):
    """R / P visits to each peer in a round, in the order of the visits."""

    def __init__(self, experts: Int[Array, "T k"], owned: int, peers: Peers):
        super().__init__(experts, owned, peers)
        self.room = math.ceil(ROOM * experts.size / peers.number)
        self.owner = experts.reshape(-1) // owned
        order = jnp.argsort(self.owner, stable=True)
        first = jnp.searchsorted(self.owner[order], jnp.arange(peers.number))
        self.turn = jnp.argsort(order) - first[self.owner]  # among the visits to the same owner

    @property
    def rounds(self) -> Int[Array, ""]:
        return _greatest(self.turn.max() // self.room + 1)

    def trip(self, number: Int[Array, ""] | int) -> Trip:
        every, room = self.peers.number * self.room, self.room
        row = jnp.where(self.turn // room == number, self.owner * room + self.turn % room, every)
        visit = jnp.full(every, row.size).at[row].set(jnp.arange(row.size), mode="drop")
        slots = Rows(visit, row.reshape(self.experts.shape))
        asked = (self.experts % self.owned).reshape(-1).at[visit].get(mode="fill", fill_value=self.owned)

        def exchange(x: Any) -> Any:
            return jax.lax.all_to_all(x, self.peers.axes, split_axis=0, concat_axis=0, tiled=True)

        return Trip(
            exchange(asked),
            lambda x: exchange(dispatch(x, slots)),
            lambda weights: exchange(spread(weights, slots)),
            lambda y: collect(exchange(y), slots),
        )


class Ragged(Way):
    """R visits from all peers together in a round, those of the first peer first."""

    def __init__(self, experts: Int[Array, "T k"], owned: int, peers: Peers):
        super().__init__(experts, owned, peers)
        self.room = math.ceil(ROOM * experts.size)
        owner = experts.reshape(-1) // owned
        order = jnp.argsort(owner, stable=True)
        self.rows = Rows(order, jnp.argsort(order).reshape(experts.shape), order)
        self.sent = jax.lax.all_gather(jnp.bincount(owner, length=peers.number), peers.axes)  # [from, to]
        self.first = jnp.cumsum(self.sent, axis=1) - self.sent  # row of the first visit from one peer to another, at the sender
        self.queue = jnp.cumsum(self.sent, axis=0) - self.sent  # how many visits stand before it at the receiver, over all rounds

    @property
    def rounds(self) -> Int[Array, ""]:
        return _greatest(-(-self.sent.sum(axis=0).max() // self.room))

    def trip(self, number: Int[Array, ""] | int) -> Trip:
        begin, me = number * self.room, jax.lax.axis_index(self.peers.axes)
        arrives = jnp.clip(self.queue - begin, 0, self.room)
        count = jnp.clip(self.queue + self.sent - begin, 0, self.room) - arrives
        leaves = self.first + jnp.clip(begin - self.queue, 0, self.sent)

        def exchange(x: Any, length: int, away: bool, fill: int = 0) -> Any:
            """From the senders' rows to the receivers' with `away`, else back; the other axis of each matrix is the peer."""
            mine, theirs, sizes = (leaves, arrives, count) if away else (arrives.T, leaves.T, count.T)
            result = jnp.full((length, *x.shape[1:]), fill, x.dtype)
            to_peers = (a.astype(jnp.int32) for a in (mine[me], sizes[me], theirs[me], sizes[:, me]))
            return jax.lax.ragged_all_to_all(x, result, *to_peers, axis_name=self.peers.axes)

        visits, asked = self.experts.size, (self.experts % self.owned).reshape(-1)[self.rows.visit_of_row]
        return Trip(
            exchange(asked, self.room, True, fill=self.owned),
            lambda x: exchange(dispatch(x, self.rows), self.room, True),
            lambda weights: exchange(spread(weights, self.rows), self.room, True),
            lambda y: collect(exchange(y, visits, False), self.rows),
        )


def exchanged(
    x: Float[Array, "T C"], experts: Array, weights: Array, inner: Array, out: Array, *, peers: Peers, way: type[Way]
) -> Float[Array, "T C"]:
    """`routed_swiglu` for this device's tokens, with this device's experts alone; called by all peers together."""
    # The first round is written plainly, so that its results may be kept for the backward pass; the others are made again there.
    with jax.named_scope(FIRST_ROUND):
        brought = _one_round(x, weights, inner, out, way(experts, inner.shape[0], peers), 0)
    return summed(brought + _further_rounds(x, weights, inner, out, experts, peers, way), weights.dtype)


def _one_round(x: Array, weights: Array, inner: Array, out: Array, travels: Way, number: Array | int) -> Float[Array, "T k C"]:
    trip = travels.trip(number)
    return trip.back(visited(trip.there(x), trip.experts[:, None], trip.weights(weights)[:, None], inner, out)[:, 0])


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _further_rounds(
    x: Array, weights: Array, inner: Array, out: Array, experts: Array, peers: Peers, way: type[Way]
) -> Float[Array, "T k C"]:
    """What the visits bring that had no room in the first round."""
    travels = way(experts, inner.shape[0], peers)
    last = travels.rounds

    def one_more(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        number, brought = carry
        return number + 1, brought + _one_round(x, weights, inner, out, travels, number)

    nothing = jnp.zeros((*experts.shape, x.shape[1]), x.dtype)
    with jax.named_scope(FURTHER_ROUNDS):
        return jax.lax.while_loop(lambda carry: carry[0] < last, one_more, (jnp.ones_like(last), nothing))[1]


def _further_rounds_fwd(x, weights, inner, out, experts, peers, way):
    return _further_rounds(x, weights, inner, out, experts, peers, way), (x, weights, inner, out, experts)


def _further_rounds_bwd(peers, way, saved, g):
    *learnt, experts = saved
    travels = way(experts, learnt[2].shape[0], peers)
    last = travels.rounds

    def one_more(carry):
        number, sums = carry
        _, pull = jax.vjp(lambda x, weights, inner, out: _one_round(x, weights, inner, out, travels, number), *learnt)
        return number + 1, jax.tree.map(jnp.add, sums, pull(g))

    nothing = tuple(map(jnp.zeros_like, learnt))
    with jax.named_scope(FURTHER_ROUNDS):
        _, sums = jax.lax.while_loop(lambda carry: carry[0] < last, one_more, (jnp.ones_like(last), nothing))
    return *sums, np.zeros(experts.shape, jax.dtypes.float0)


_further_rounds.defvjp(_further_rounds_fwd, _further_rounds_bwd)


def _greatest(x: Int[Array, ""]) -> Int[Array, ""]:
    """Of all devices: a loop that exchanges must end for all alike."""
    return jax.lax.pmax(x, jax.sharding.get_abstract_mesh().axis_names)
