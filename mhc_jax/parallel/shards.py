"""Running a function on each device's own part: the way kernels, sorting, expert and table exchanges meet a mesh."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from mhc_jax.parallel.rules import Rules

Axes = tuple[str | None, ...]  # logical names of an array's axes

# What runs from sublayer to sublayer: every device has its own positions of its own sequences.
STREAMS: Axes = ("batch", "sequence", None)
# Arrays with tokens last, such as coefficients: one axis of tokens, on which each device's own stand together, sequence by sequence. Such
# an axis is in the order of [B, S] where no axis of the mesh splits sequences; what reads it as sequences goes through `first_sequence`.
TOKENS_LAST: Axes = (None, "tokens")


def on_shards(
    f: Callable[..., Any], rules: Rules, *, given: Sequence[Axes | None], results: Axes | Sequence[Axes | None]
) -> Callable[..., Any]:
    """`f` run once on each device's part, under the mesh set by `jax.set_mesh`; `f` itself where none is set.

    `given` names the axes of each argument, and `results` those of the result or of each of several; they are split there as the rules say.
    An argument with None (parameters, any pytree) reaches every device whole, and its gradients are summed over the devices.
    """

    def split(axes: Axes | None) -> PartitionSpec:
        return PartitionSpec() if axes is None else rules.spec(*axes)

    def sharded(*args: Any) -> Any:
        if jax.sharding.get_abstract_mesh().empty:
            return f(*args)
        one = all(axis is None or isinstance(axis, str) for axis in results)
        out_specs = split(results) if one else tuple(split(axes) for axes in results)  # type: ignore[arg-type]
        # The check that tracks which values vary over devices is off: hand-written gradients would have to speak its language, which
        # changes between JAX releases. Sums over shards are where the specs say: in the gradients of arguments that are not split.
        return jax.shard_map(f, in_specs=tuple(split(axes) for axes in given), out_specs=out_specs, check_vma=False)(*args)

    return sharded


def constrained(x: Array, rules: Rules, *axes: str | None) -> Array:
    """The array, to be split as the rules say of these axes where a mesh is set."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, rules.spec(*axes))


def axes_here(rules: Rules, axis: str) -> tuple[str, ...]:
    """The mesh axes of more than one device that a logical axis is split over under the mesh that is set; none without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(name for name in rules.mesh_axes(axis) if not mesh.empty and mesh.shape[name] > 1)


def shard_count(rules: Rules, axis: str) -> int:
    """In how many parts a logical axis is split under the mesh that is set; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[name] for name in axes_here(rules, axis))


def with_halo(x: Array, reach: int, rules: Rules) -> Array:
    """[B, S, *more] of one device to [B, reach + S, *more]: before its own positions the last `reach` of the device that has those before.

    Inside `on_shards`. Before the first positions of all stand zeros.
    """
    axes, count = rules.mesh_axes("sequence"), shard_count(rules, "sequence")
    before = jax.lax.ppermute(x[:, -reach:], axes, [(i, i + 1) for i in range(count - 1)])
    return jax.numpy.concatenate([before, x], axis=1)


def first_sequence(x: Array, batch: int, rules: Rules) -> Array:
    """[..., T] with tokens last to [..., S]: the tokens of the first of `batch` sequences, in order."""
    across, along = shard_count(rules, "batch"), shard_count(rules, "sequence")
    parts = x.reshape(*x.shape[:-1], across, along, batch // across, -1)
    return parts[..., 0, :, 0, :].reshape(*x.shape[:-1], -1)
