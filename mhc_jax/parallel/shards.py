"""Running a function on each device's own tokens: the way kernels, sorting and table look-ups meet a mesh."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from mhc_jax.parallel.rules import Rules

Axes = tuple[int | None, ...]


def on_token_shards(f: Callable[..., Any], rules: Rules, *, tokens: Axes, results: int | Axes = 0) -> Callable[..., Any]:
    """`f` run once per shard of the tokens, under the mesh set by `jax.set_mesh`; `f` itself where none is set.

    `tokens` names the token axis of each argument, and `results` that of each result; they are split there as `rules.batch` says. Arguments
    with None (parameters) reach every shard whole; their gradients are summed over the shards.
    """

    def split(axis: int | None) -> PartitionSpec:
        return PartitionSpec() if axis is None else rules.spec(*[None] * axis, "batch")

    def sharded(*args: Any) -> Any:
        if jax.sharding.get_abstract_mesh().empty:
            return f(*args)
        out_specs = split(results) if isinstance(results, int) else tuple(split(axis) for axis in results)
        # The check that tracks which values vary over devices is off: hand-written gradients would have to speak its language, which
        # changes between JAX releases. Sums over shards are where the specs say: in the gradients of arguments that are not split.
        return jax.shard_map(f, in_specs=tuple(split(axis) for axis in tokens), out_specs=out_specs, check_vma=False)(*args)

    return sharded
