"""Running a function on each device's own tokens: the way kernels, sorting and table look-ups meet a mesh."""

from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from mhc_jax.parallel.rules import Rules


def on_token_shards(f: Callable[..., Array], rules: Rules, *, tokens: int) -> Callable[..., Array]:
    """`f` run once per shard of the token axis, under the mesh set by `jax.set_mesh`; `f` itself where none is set.

    The first `tokens` arguments and the result have tokens on axis 0 and are split there as `rules.batch` says. The others (parameters)
    reach every shard whole; their gradients are summed over the shards.
    """

    def sharded(*args: Array) -> Array:
        if jax.sharding.get_abstract_mesh().empty:
            return f(*args)
        split = rules.spec("batch")
        in_specs = tuple(split if i < tokens else PartitionSpec() for i in range(len(args)))
        # The check that tracks which values vary over devices is off: hand-written gradients would have to speak its language, which
        # changes between JAX releases. Sums over shards are where the specs say: in the gradients of arguments that are not split.
        return jax.shard_map(f, in_specs=in_specs, out_specs=split, check_vma=False)(*args)

    return sharded
