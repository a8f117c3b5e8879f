"""Programs of three warpgroups: the last brings what comes by in tiles, the others, USERS, multiply. No kernels.

Tiles take turns in SLOTS places of shared memory. Of every place the barrier `full` says that its tile has arrived, `empty` that all have
used it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.launch import WARPGROUP

Array = jax.Array

USERS = 2
SLOTS = 2
BRINGER_REGISTERS, USER_REGISTERS = 40, 232  # of a thread; 128 and 2 * 128 threads together have 65536


def bring(steps: Array | int, fetch: Callable, full: Any, empty: Any, arrive: Callable[[int, Any], None] | None = None) -> None:
    """fetch(step, slot, full) for all steps in turn. `arrive` is called for every step once the next one's copies are under way."""

    def one(step, _):
        slot = jax.lax.rem(step, jnp.int32(SLOTS))
        pl.when(step >= SLOTS)(lambda: plgpu.barrier_wait(empty.at[slot]))
        fetch(step, slot, full.at[slot])
        if arrive is not None:
            pl.when(step > 0)(lambda: arrive(1, full.at[jax.lax.rem(step - 1, jnp.int32(SLOTS))]))

        return ()

    jax.lax.fori_loop(0, steps, one, ())
    if arrive is not None:
        pl.when(steps > 0)(lambda: arrive(0, full.at[jax.lax.rem(steps - 1, jnp.int32(SLOTS))]))

    def drain(step, _):  # the interpreter wants every phase of a barrier waited for
        plgpu.barrier_wait(empty.at[jax.lax.rem(step, jnp.int32(SLOTS))])
        return ()

    jax.lax.fori_loop(jnp.maximum(steps - SLOTS, 0), steps, drain, ())


class Stream(NamedTuple):
    """What is brought together for a step: fetch(step, slot, full barrier) starts its copies."""

    fetch: Callable[[Array, Array, Any], None]
    full: Any
    empty: Any


def bring_streams(steps: Array | int, streams: list[Stream], slots: int) -> None:
    """Fetches all streams' steps in turn; every stream has places and barriers of its own, `slots` of them."""

    def one(step, _):
        slot = jax.lax.rem(step, jnp.int32(slots))
        for stream in streams:
            pl.when(step >= slots)(partial(plgpu.barrier_wait, stream.empty.at[slot]))
            stream.fetch(step, slot, stream.full.at[slot])
        return ()

    jax.lax.fori_loop(0, steps, one, ())

    def drain(step, _):  # the interpreter wants every phase of a barrier waited for
        for stream in streams:
            plgpu.barrier_wait(stream.empty.at[jax.lax.rem(step, jnp.int32(slots))])
        return ()

    jax.lax.fori_loop(jnp.maximum(steps - slots, 0), steps, drain, ())


def release(barrier: Any, interpret: bool) -> None:
    """Says that this warpgroup has read what `bring_streams` may replace: by wgmma, and waited for it, or into registers."""
    if interpret:
        plgpu.commit_smem()  # products read like any other instruction there, and its race detector asks for a fence before a copy
    plgpu.barrier_arrive(barrier)


def use(steps: Array | int, body: Callable, carry: Any, full: Any, empty: Any) -> Any:
    """carry = body(step, slot, carry) for all steps in turn; returns the last carry."""

    def one(step, carry):
        slot = jax.lax.rem(step, jnp.int32(SLOTS))
        plgpu.barrier_wait(full.at[slot])
        carry = body(step, slot, carry)
        plgpu.commit_smem()  # what was read before what is copied next
        plgpu.barrier_arrive(empty.at[slot])
        return carry

    return jax.lax.fori_loop(0, steps, one, carry)


def divide(bringer: Callable[[], None], users: list[Callable[[], None]]) -> None:
    """Runs what each warpgroup does, with registers shared out."""
    who = jax.lax.axis_index(WARPGROUP)

    def last():
        plgpu.set_max_registers(BRINGER_REGISTERS, action="decrease")
        bringer()

    def others():
        plgpu.set_max_registers(USER_REGISTERS, action="increase")
        for i, user in enumerate(users):
            if len(users) == 1:
                user()
            else:
                pl.when(who == i)(user)

    pl.when(who == USERS)(last)
    pl.when(who < USERS)(others)


def meet(barrier: Any) -> None:
    """All users wait for each other; the barrier counts USERS arrivals."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)
