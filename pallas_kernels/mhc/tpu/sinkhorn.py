"""Gates on TPU registers, and Sinkhorn's iteration alone over many tokens: planes of [8, 128] tokens, one for every entry of a matrix."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mhc import gates
from pallas_kernels.mhc.spec import Mapping
from pallas_kernels.tpu.tiles import LANES, Interpret, round_up

SUBLANES = 8

_approximate: Any = pltpu.reciprocal if hasattr(pltpu, "reciprocal") else pl.reciprocal  # moved in jax 0.11


def invert(s: jax.Array) -> jax.Array:
    """1 / s for s in float32's normal range, infinity excepted: the approximate reciprocal and one step of Newton's."""
    r = _approximate(s, approx=True)
    return r * (2.0 - s * r)


def coefficients(logits: gates.Planes, mapping: Mapping) -> gates.Planes:
    """Planes of logits -> planes of h. A sigmoid's argument stops at -80, where it is 2e-35: `invert` has no value at infinity.

    What an approximate reciprocal leaves of a row's sum is taken off at the end: rows sum to one as exactly as float32 can.
    """
    n = mapping.n
    h = gates.gates([jnp.maximum(z, -80.0) for z in logits[: 2 * n]] + logits[2 * n :], mapping, invert)
    if not mapping.mixes or mapping.sinkhorn_eps:
        return h
    for at in range(2 * n, len(h), n):
        row = h[at : at + n]
        correction = 2.0 - functools.reduce(jnp.add, row)
        h[at : at + n] = [entry * correction for entry in row]
    return h


def sinkhorn(logits: jax.Array, steps: int, eps: float, *, interpret: Interpret = False) -> jax.Array:
    """Logits [n, n, T] float32 -> nearly doubly stochastic matrices [n, n, T], as `reference.sinkhorn`."""
    return _call(_forward_kernel, [logits], Mapping(logits.shape[0], sinkhorn_steps=steps, sinkhorn_eps=eps), [], interpret)


def sinkhorn_backward(logits: jax.Array, d: jax.Array, steps: int, eps: float, *, interpret: Interpret = False) -> jax.Array:
    """The gradient for logits [n, n, T] from that for `sinkhorn(logits)`, of the very steps that it takes."""
    n = logits.shape[0]
    sums = pltpu.VMEM((max(1, steps - 1), 2 * n, SUBLANES, LANES), jnp.float32)
    return _call(_backward_kernel, [logits, d], Mapping(n, sinkhorn_steps=steps, sinkhorn_eps=eps), [sums], interpret)


def _forward_kernel(mapping, logits, out):
    for k, plane in enumerate(coefficients(_unused(mapping) + _planes(logits), mapping)[2 * mapping.n :]):
        out[k] = plane


def _backward_kernel(mapping, logits, d, out, sums):
    unused = _unused(mapping)
    for k, plane in enumerate(gates.gates_backward(unused + _planes(logits), unused + _planes(d), mapping, sums, invert)[2 * mapping.n :]):
        out[k] = plane


def _planes(ref: Any) -> gates.Planes:
    return [ref[k] for k in range(ref.shape[0])]


def _unused(mapping: Mapping) -> gates.Planes:
    """In the place of pre and post, whose arithmetic the compiler then drops."""
    return [jnp.zeros((SUBLANES, LANES), jnp.float32)] * (2 * mapping.n)


def _call(kernel: Any, arrays: list[jax.Array], mapping: Mapping, scratch: list[Any], interpret: Interpret) -> jax.Array:
    entries, tokens = mapping.n**2, arrays[0].shape[-1]
    padded = round_up(tokens, SUBLANES * LANES)
    planes = [jnp.pad(a.reshape(entries, tokens), ((0, 0), (0, padded - tokens))).reshape(entries, -1, LANES) for a in arrays]
    spec = pl.BlockSpec((entries, SUBLANES, LANES), lambda t: (0, t, 0))
    out = pl.pallas_call(
        functools.partial(kernel, mapping),
        grid=(padded // (SUBLANES * LANES),),
        in_specs=[spec] * len(planes),
        out_specs=spec,
        out_shape=jax.ShapeDtypeStruct(planes[0].shape, jnp.float32),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
    )(*planes)
    return out.reshape(entries, padded)[:, :tokens].reshape(arrays[0].shape)
