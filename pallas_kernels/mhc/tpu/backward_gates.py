"""The part of the backward pass that knows no streams: gradients for h to gradients for the logits, 1024 tokens at a time.

Streams come in by one term alone, <d_u, x'_i> on the rows of pre. It is linear, and the kernel of backward.py adds it.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mhc.gates import gates_backward
from pallas_kernels.mhc.spec import Mapping

PLANE = (8, 128)
TOKENS = PLANE[0] * PLANE[1]


def logits_backward(z: jax.Array, dh: jax.Array, gate: jax.Array, bias: jax.Array, mapping: Mapping, interpret: bool) -> jax.Array:
    """z and dh [K, T], gate and bias [K] -> [K + 2 n, T]: gradients for the logits, then pre and its slope at every logit; all float32."""
    rows, tokens = z.shape
    spec = pl.BlockSpec((rows, TOKENS), lambda i: (0, i))
    scalars = pl.BlockSpec(memory_space=pltpu.SMEM)
    return pl.pallas_call(
        partial(_kernel, mapping=mapping),
        out_shape=jax.ShapeDtypeStruct((rows + 2 * mapping.n, tokens), jnp.float32),
        grid=(pl.cdiv(tokens, TOKENS),),
        in_specs=[scalars, scalars, spec, spec],
        out_specs=pl.BlockSpec((rows + 2 * mapping.n, TOKENS), lambda i: (0, i)),
        scratch_shapes=[pltpu.VMEM((max(mapping.sinkhorn_steps - 1, 1), 2 * mapping.n, *PLANE), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name="mhc_logits_backward",
    )(gate, bias, z, dh)


def _kernel(gate, bias, z_ref, dh_ref, out_ref, sums, *, mapping: Mapping):
    n, rows = mapping.n, mapping.rows
    z, dh = z_ref[...].reshape(rows, *PLANE), dh_ref[...].reshape(rows, *PLANE)
    logits = [gate[k] * z[k] + bias[k] for k in range(rows)]
    out = gates_backward(logits, [dh[k] for k in range(rows)], mapping, sums, invert)
    pre = [invert(1.0 + jnp.exp(-logits[i])) for i in range(n)]
    out += [p + mapping.pre_eps for p in pre] + [p * (1.0 - p) for p in pre]
    out_ref[...] = jnp.stack(out).reshape(rows + 2 * n, TOKENS)


def invert(s: jax.Array) -> jax.Array:
    """1 / s for s >= 0: the hardware's estimate and one Newton step. Bounded, because 1 / inf must be 0 and the step would make it NaN."""
    s = jnp.minimum(s, 1e37)
    estimate = _estimate(s)
    return estimate * (2.0 - s * estimate)


def _estimate(s: jax.Array) -> jax.Array:
    reciprocal = getattr(pltpu, "reciprocal", None) or pl.reciprocal  # newer releases moved it
    return reciprocal(s, approx=True)
