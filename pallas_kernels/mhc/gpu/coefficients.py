"""Kernels for what each token has a few of: gates and Sinkhorn, forward and backward. One token to a thread, its matrix in registers.

Walking back, the 2 n sums of each Sinkhorn step are in shared memory: 78 KB for a program of 128 tokens at n = 4 and 20 steps, 156 KB at
n = 8.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.launch import SHARED_MEMORY, kernel
from pallas_kernels.mhc import gates
from pallas_kernels.mhc.spec import Mapping

THREADS = 128  # of a warpgroup: tokens of a program


def misfit(x: jax.Array, mapping: Mapping, flat: bool) -> str | None:
    """What keeps the kernels from taking a mapping: more sums than shared memory holds. Streams of any size fit."""
    most = 1 + SHARED_MEMORY // (8 * mapping.n * THREADS)
    if mapping.mixes and mapping.sinkhorn_steps > most:
        return f"sinkhorn_steps is {mapping.sinkhorn_steps}; the GPU kernel walks back at most {most} steps with {mapping.n} streams"
    return None


def forward(logits: jax.Array, mapping: Mapping, *, interpret: bool = False) -> jax.Array:
    """Logits [K, T] float32 -> h [K, T] float32 (arXiv 2512.24880, Eq. 17-19)."""
    return _by_token(lambda planes: gates.gates(planes, mapping), [logits], interpret=interpret)


def backward(logits: jax.Array, dh: jax.Array, mapping: Mapping, *, interpret: bool = False) -> jax.Array:
    """Gradient for the logits [K, T] from that for h, float32."""
    rows = mapping.rows
    steps = mapping.sinkhorn_steps - 1 if mapping.mixes else 0
    sums = (steps, 2 * mapping.n, THREADS)

    def rule(planes, memory=None):
        return gates.gates_backward(planes[:rows], planes[rows:], mapping, memory)

    return _by_token(rule, [logits, dh], sums=sums if steps else None, interpret=interpret)


def sinkhorn(logits: jax.Array, steps: int = 20, eps: float = 0.0, *, interpret: bool = False) -> jax.Array:
    """Logits [n, n, T] float32 -> nearly doubly stochastic matrices [n, n, T] (Eq. 9)."""
    n = logits.shape[0]
    h = forward(_as_gates(logits), Mapping(n, sinkhorn_steps=steps, sinkhorn_eps=eps), interpret=interpret)
    return h[2 * n :].reshape(logits.shape)


def sinkhorn_backward(logits: jax.Array, d: jax.Array, steps: int = 20, eps: float = 0.0, *, interpret: bool = False) -> jax.Array:
    """Gradient for the logits [n, n, T] from that for the matrices."""
    n = logits.shape[0]
    dl = backward(_as_gates(logits), _as_gates(d), Mapping(n, sinkhorn_steps=steps, sinkhorn_eps=eps), interpret=interpret)
    return dl[2 * n :].reshape(logits.shape)


def _as_gates(matrices: jax.Array) -> jax.Array:
    """[n, n, T] -> [K, T], with zeros for pre and post."""
    n, _, tokens = matrices.shape
    return jnp.pad(matrices.astype(jnp.float32).reshape(n * n, tokens), ((2 * n, 0), (0, 0)))


def _by_token(rule: Callable, arrays: list[jax.Array], *, interpret: bool, sums: tuple[int, int, int] | None = None) -> jax.Array:
    """Runs `rule(planes, [memory])` on planes [128], rows of `arrays` [K, T] one after the other; what it returns becomes [K, T]."""
    rows, tokens = arrays[0].shape
    programs = -(-tokens // THREADS)
    inputs = {f"array {k}": jnp.pad(a, ((0, 0), (0, programs * THREADS - tokens))) for k, a in enumerate(arrays)}

    def body(refs, memory=None):
        here = pl.ds(jax.lax.axis_index("program") * THREADS, THREADS)
        planes = [refs[name][k, here] for name in inputs for k in range(rows)]
        for k, plane in enumerate(rule(planes, memory) if sums else rule(planes)):
            refs["out"][k, here] = plane

    outputs = {"out": jax.ShapeDtypeStruct((rows, programs * THREADS), jnp.float32)}
    scratch = (plgpu.SMEM(sums, jnp.float32),) if sums else ()
    return kernel(body, inputs, outputs, {"program": programs}, interpret=interpret, scratch=scratch)["out"][:, :tokens]
