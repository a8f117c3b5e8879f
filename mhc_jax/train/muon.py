"""Muon for matrices that are split over devices: each device orthogonalises whole matrices, and no more of them than the others.

The steps of Newton and Schulz multiply a matrix with itself, for which its rows and columns must be in one place. So devices that hold
parts of the same matrices exchange them, as many whole ones for each, and devices that hold copies share the work; what comes out goes
back the same way. One matrix's products are `optax.contrib.scale_by_muon`'s. Which parameters Muon trains is `train.optimizer`'s to say.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int

from mhc_jax.nn.module import Spec, specs
from mhc_jax.parallel.mesh import partition
from mhc_jax.parallel.rules import Rules

# Of DeepSeek-V4's Muon (arXiv 2606.19348): momentum, and the root mean square that an update is scaled to, like that of AdamW's.
BETA = 0.95
RMS = 0.18
EPS = 1e-20
AT_ONCE = 4  # matrices that a device of several orthogonalises together: their products, at 27B, are 0.1 GB a matrix


class Momentum(NamedTuple):
    """Gradients counted and averaged."""

    updates: Int[Array, ""]
    mean: Any


def muon(rules: Rules, axes_of: Callable[[Spec], optax.contrib.MuonDimensionNumbers | None]) -> optax.GradientTransformation:
    """The direction of Muon with Nesterov's momentum for parameters that `axes_of` gives rows and columns, under the mesh that is set."""

    def orthogonal(model: Any, _: Any = None) -> Any:
        return jax.tree.map(lambda x, spec: _direction(x, spec, axes_of(spec), rules), model, specs(model))

    return optax.chain(_momentum(), optax.stateless(orthogonal))


def _momentum() -> optax.GradientTransformation:
    """Means of gradients, looked ahead by one step and corrected for their beginning at zero, as `optax.contrib.muon` does it."""

    def init(model: Any) -> Momentum:
        return Momentum(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, model))

    def update(gradient: Any, state: Momentum, model: Any = None) -> tuple[Any, Momentum]:
        del model
        mean = optax.tree.update_moment(gradient, state.mean, BETA, 1)
        count = optax.safe_increment(state.updates)
        ahead = optax.tree.bias_correction(mean, BETA, optax.safe_increment(count))
        now = optax.tree.bias_correction(gradient, BETA, count)
        return jax.tree.map(lambda m, g: BETA * m + (1 - BETA) * g, ahead, now), Momentum(count, mean)

    return optax.GradientTransformation(init, update)


def _direction(x: Array, spec: Spec, numbers: optax.contrib.MuonDimensionNumbers | None, rules: Rules) -> Array:
    """Every matrix of a parameter, orthogonalised and scaled."""
    assert numbers is not None, "a parameter without rows and columns is not Muon's"
    rows_of, columns_of = numbers.reduction_axis, numbers.output_axis
    assert isinstance(rows_of, tuple) and isinstance(columns_of, tuple)
    first = x.ndim - len(rows_of) - len(columns_of)
    assert (*rows_of, *columns_of) == tuple(range(first, x.ndim)), "matrices are the last axes"
    rows, columns = (math.prod(x.shape[i] for i in axes) for axes in (rows_of, columns_of))
    of_stack = optax.contrib.MuonDimensionNumbers(*(tuple(1 + i - first for i in axes) for axes in (rows_of, columns_of)))
    orthogonal = partial(_orthogonal, numbers=of_stack)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        found = orthogonal(x.reshape(-1, *x.shape[first:])).reshape(x.shape)
    else:
        split = partition(mesh, rules, spec, x.shape)
        share = partial(_shared, orthogonal=orthogonal, first=first, split=split, sizes=dict(mesh.shape))
        found = jax.shard_map(share, in_specs=split, out_specs=split, check_vma=False)(x)
    return RMS * math.sqrt(max(rows, columns)) * found


def _orthogonal(stack: Array, numbers: optax.contrib.MuonDimensionNumbers) -> Array:
    """Of matrices [number, ...]. Without momentum, Muon's update is that of its gradient alone."""
    alone = optax.contrib.scale_by_muon(beta=0.0, nesterov=False, eps=EPS, weight_dimension_numbers=numbers)
    return alone.update(stack, alone.init(stack))[0]


def _shared(x: Array, *, orthogonal: Callable[[Array], Array], first: int, split: PartitionSpec, sizes: dict[str, int]) -> Array:
    """A device's part of a parameter, whose matrices begin at the axis `first`. `sizes` are those of the mesh's axes."""

    def names(entry: Any) -> tuple[str, ...]:
        some = (entry,) if isinstance(entry, str) else entry or ()
        return tuple(name for name in some if sizes[name] > 1)

    by_axis = [names(entry) for entry in (*split, *(None,) * (x.ndim - len(split)))]
    exchanged = [(1 + axis - first, own) for axis, own in enumerate(by_axis) if axis >= first and own]
    copies = tuple(name for name, size in sizes.items() if size > 1 and not any(name in own for own in by_axis))
    whole, number = x.shape, math.prod(x.shape[:first])
    groups = math.prod(sizes[name] for own in (copies, *(own for _, own in exchanged)) for name in own)
    x = x.reshape(number, *whole[first:])
    x = jnp.pad(x, [(0, -number % groups), *[(0, 0)] * (x.ndim - 1)])
    if copies:
        share = x.shape[0] // math.prod(sizes[name] for name in copies)
        x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(copies) * share, share)
    for axis, own in exchanged:
        x = jax.lax.all_to_all(x, own, split_axis=0, concat_axis=axis, tiled=True)
    x = jax.lax.map(lambda matrix: orthogonal(matrix[None])[0], x, batch_size=AT_ONCE)
    for axis, own in reversed(exchanged):
        x = jax.lax.all_to_all(x, own, split_axis=axis, concat_axis=0, tiled=True)
    if copies:
        x = jax.lax.all_gather(x, copies, tiled=True)
    return x[:number].reshape(whole)
