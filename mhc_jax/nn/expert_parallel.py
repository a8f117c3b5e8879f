"""Experts that devices share: every visit travels to the device that owns its expert, and what it brought travels back.

Device p of the P that share experts owns E / P of them, side by side, so that routing to few groups of experts is routing to few devices
that lie side by side. A round is one exchange into room of fixed size, a little more than balanced routing needs; what finds no room there
follows in further rounds, which cost nothing while there are none. No visit is dropped, and the result does not depend on the room.

    Padded   all-to-all of equal parts, filled up (CPU, GPU); the receiver sorts by expert
    Ragged   each part as long as it is (TPU): a quarter fewer bytes, one room for all peers, and rows arrive sorted

The products are in experts.py.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mhc_jax.nn.experts import Permutation, Rows, combine, dispatch, no_gradient, routed_swiglu, spread, swiglu_of_sorted
from mhc_jax.parallel.rules import Rules
from mhc_jax.parallel.shards import STREAMS, axes_here, on_shards, shard_count
from pallas_kernels.choose import LANES

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

    def whole(matrices: Array, rows: str) -> Array:
        across = axes_here(rules, rows)
        return jax.lax.all_gather(matrices, across, axis=1, tiled=True) if across else matrices

    def local(x: Array, experts: Array, weights: Array, inner: Array, out: Array) -> Array:
        given = (*(a.reshape(-1, a.shape[-1]) for a in (x, experts, weights)), whole(inner, "embed"), whole(out, "expert_hidden"))
        if peers.number == 1:
            return routed_swiglu(*given).reshape(x.shape)
        ways = {name: partial(exchanged, peers=peers, way=way) for name, way in (("tpu", Ragged), ("default", Padded))}
        return jax.lax.platform_dependent(*given, **ways).reshape(x.shape)

    given = (STREAMS, STREAMS, STREAMS, ("experts", "embed", None), ("experts", "expert_hidden", None))
    return on_shards(local, rules, given=given, results=STREAMS)(x, experts, weights, inner.astype(x.dtype), out.astype(x.dtype))


class Peers(NamedTuple):
    """The devices that share experts with this one, inside `shard_map`."""

    axes: tuple[str, ...]
    number: int  # P


class Padded(NamedTuple):
    """A round takes as many visits to each peer, in the order of the visits; the rest of the room stays empty."""

    experts: Int[Array, "T k"]
    turn: Int[Array, "visits"]  # of a visit among those to the same peer

    @classmethod
    def of(cls, experts: Int[Array, "T k"], owned: int, peers: Peers) -> "Padded":
        """How visits to these experts travel, where every device owns `owned`."""
        owner = experts.reshape(-1) // owned
        order = jnp.argsort(owner, stable=True)
        first = jnp.searchsorted(owner[order], jnp.arange(peers.number))
        return cls(experts, jnp.argsort(order) - first[owner])

    def rounds(self, peers: Peers) -> Int[Array, ""]:
        """In how many rounds all visits of all devices are made."""
        return _greatest(self.turn.max() // self._room(peers) + 1)

    def round(
        self, number: Int[Array, ""] | int, x: Array, weights: Array, inner: Array, out: Array, peers: Peers
    ) -> Float[Array, "T tiles lanes"]:
        """The sum of what a token's visits in round `number`, from 0, bring; in float32 or wider."""
        room, owned = self._room(peers), inner.shape[0]
        every, owner = peers.number * room, self.experts.reshape(-1) // owned
        row = jnp.where(self.turn // room == number, owner * room + self.turn % room, every)
        visit = jnp.full(every, row.size).at[row].set(jnp.arange(row.size), mode="drop")
        slots = Rows(visit, row.reshape(self.experts.shape))
        asked = (self.experts % owned).reshape(-1).at[visit].get(mode="fill", fill_value=owned)

        def exchange(x: Any) -> Any:
            return jax.lax.all_to_all(x, peers.axes, split_axis=0, concat_axis=0, tiled=True)

        arrived, weight = exchange(dispatch(x, slots)), exchange(spread(weights, slots))
        made = routed_swiglu(arrived.reshape(every, -1), exchange(asked)[:, None], weight[:, None], inner, out, some_empty=True)
        return combine(exchange(made.reshape(arrived.shape)), slots)

    def _room(self, peers: Peers) -> int:
        return math.ceil(ROOM * self.experts.size / peers.number)


class Ragged(NamedTuple):
    """A round takes what fits one room for all peers and experts; rows arrive sorted by expert, and lie so at their sender.

    Every device knows how many visits each peer has for each expert, so no visit says what it is for, and none is sorted where it arrives:
    the visits of one peer to one expert are a piece, and pieces go to their place. A weight travels as a row of its own, LANES times over:
    what an exchange on a TPU makes of a single number, but nobody need take single numbers out of rows then, which its compiler does badly.
    """

    rows: Permutation  # sorted by expert
    sent: Int[Array, "P P owned"]  # visits from a peer to an expert of a peer

    @classmethod
    def of(cls, experts: Int[Array, "T k"], owned: int, peers: Peers) -> "Ragged":
        """How visits to these experts travel, where every device owns `owned`."""
        visits = experts.reshape(-1)
        order = jnp.argsort(visits, stable=True)
        every = jnp.arange(peers.number * owned, dtype=experts.dtype)
        sent = jnp.sum(visits[:, None] == every[None], axis=0, dtype=jnp.int32).reshape(peers.number, owned)
        return cls(Permutation(order, jnp.argsort(order).reshape(experts.shape)), jax.lax.all_gather(sent, peers.axes))

    def rounds(self, peers: Peers) -> Int[Array, ""]:
        """In how many rounds all visits of all devices are made."""
        return _greatest(-(-self.sent.sum(axis=(0, 2)).max() // self._room()))

    def round(
        self, number: Int[Array, ""] | int, x: Array, weights: Array, inner: Array, out: Array, peers: Peers
    ) -> Float[Array, "T tiles lanes"]:
        """The sum of what a token's visits in round `number`, from 0, bring; in float32 or wider."""
        begin, room, me = number * self._room(), self._room(), jax.lax.axis_index(peers.axes)
        # Of each piece: its first row at its sender, and where it stands among all that its receiver gets, over all rounds.
        first = _before(self.sent.reshape(peers.number, -1)).reshape(self.sent.shape)
        by_receiver = self.sent.transpose(1, 2, 0)
        queue = _before(by_receiver.reshape(peers.number, -1)).reshape(by_receiver.shape).transpose(2, 0, 1)
        # Of each piece in this round: where it arrives, how much of it does, where that lies at its sender.
        arrives = jnp.clip(queue - begin, 0, room)
        count = jnp.clip(queue + self.sent - begin, 0, room) - arrives
        leaves = first + jnp.clip(begin - queue, 0, self.sent)

        def exchange(x: Any, length: int, *pieces: Array) -> Any:
            """Of pieces by receiver: where they begin, their sizes, where they come to lie; of those that come, by sender: their sizes."""
            nothing = jnp.zeros((length, *x.shape[1:]), x.dtype)
            return jax.lax.ragged_all_to_all(x, nothing, *(p.reshape(-1).astype(jnp.int32) for p in pieces), axis_name=peers.axes)

        def away(x: Any) -> Any:
            return exchange(x, room, leaves[me], count[me], arrives[me], count[:, me])

        one_each = jnp.broadcast_to(weights.reshape(-1, 1), (weights.size, LANES))
        weight = away(dispatch(one_each, Permutation(self.rows.visit_of_row, self.rows.row_of_visit.reshape(-1, 1))))[:, :1]
        arrived = away(dispatch(x, self.rows))
        made = swiglu_of_sorted(arrived.reshape(room, -1), weight, count[:, me].sum(axis=0), inner, out).reshape(arrived.shape)
        return combine(exchange(made, weights.size, arrives[:, me], count[:, me], leaves[:, me], count[me]), self.rows)

    def _room(self) -> int:
        return math.ceil(ROOM * self.rows.row_of_visit.size)


def _before(sizes: Int[Array, "P pieces"]) -> Int[Array, "P pieces"]:
    """The sum of all sizes that stand before each in its row."""
    return jnp.cumsum(sizes, axis=1) - sizes


def exchanged(
    x: Float[Array, "T C"], experts: Array, weights: Array, inner: Array, out: Array, *, peers: Peers, way: type[Padded | Ragged]
) -> Float[Array, "T C"]:
    """`routed_swiglu` for this device's tokens, with this device's experts alone; called by all peers together.

    Tokens travel as tiles of LANES columns. Of a matrix a TPU holds 8 or 16 rows of a tile's columns together; laid out so, a token lies in
    one piece, and its rows are laid out anew only where products want them, not on both sides of each exchange.
    """
    tiles = x.reshape(x.shape[0], -1, LANES) if x.shape[1] % LANES == 0 else x[:, None]
    return _in_rounds(tiles, weights, inner, out, way.of(experts, inner.shape[0], peers), peers).reshape(x.shape).astype(x.dtype)


# What the first round needs again may be kept for the backward pass; the others are made again there. Both ways the others stand under a
# condition, with their sums: else all that does not depend on a round's number would be made, and zeros added, where there is none.


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _in_rounds(x: Array, weights: Array, inner: Array, out: Array, travels: Padded | Ragged, peers: Peers) -> Float[Array, "T tiles lanes"]:
    """The sum of what a token's visits bring, in float32 or wider."""
    return _in_rounds_fwd(x, weights, inner, out, travels, peers)[0]


def _in_rounds_fwd(x, weights, inner, out, travels, peers):
    learnt = x, weights, inner, out
    with jax.named_scope(FIRST_ROUND):
        brought, pull = jax.vjp(lambda *learnt: travels.round(0, *learnt, peers), *learnt)

    def one_more(number, brought):
        return brought + travels.round(number, *learnt, peers)

    return _further_rounds(travels.rounds(peers), one_more, brought), (learnt, travels, pull)


def _in_rounds_bwd(peers, saved, g):
    learnt, travels, pull = saved

    def one_more(number, sums):
        _, pull = jax.vjp(lambda *learnt: travels.round(number, *learnt, peers), *learnt)
        return jax.tree.map(jnp.add, sums, pull(g))

    return *_further_rounds(travels.rounds(peers), one_more, pull(g)), no_gradient(travels)


_in_rounds.defvjp(_in_rounds_fwd, _in_rounds_bwd)


def _further_rounds(rounds: Int[Array, ""], one_more: Callable[[Array, Any], Any], sums: Any) -> Any:
    """`sums` after one_more(number, sums) of every round but the first."""

    def all_of_them(sums: Any) -> Any:
        return jax.lax.fori_loop(1, rounds, one_more, sums)

    with jax.named_scope(FURTHER_ROUNDS):
        return jax.lax.cond(rounds > 1, all_of_them, lambda sums: sums, sums)


def _greatest(x: Int[Array, ""]) -> Int[Array, ""]:
    """Of all devices: a loop that exchanges must end for all alike."""
    return jax.lax.pmax(x, jax.sharding.get_abstract_mesh().axis_names)
