"""The gate without convolution on GPU, forward. A token stays in shared memory between its sums and the addition: it is read once."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.engram_gate.gpu.rows import LANES, as_rows, walk
from pallas_kernels.engram_gate.spec import CLAMP
from pallas_kernels.gpu.launch import kernel, pipeline

Array = jax.Array


def gate_add(streams: Array, keys_value: Array, gain: Array, norm_eps: float, *, interpret: bool = False) -> tuple[Array, Array, Array]:
    """Streams [T, nC], keys_value [T, (n+1)C], gain [n, C] float32 -> streams [T, nC], alpha [n, T], saved [3n, T] (see `xla`).

    Raises ValueError where shared memory has no room for a token.
    """
    (tokens, _), (n, width), size = streams.shape, gain.shape, streams.dtype.itemsize
    slots = 1
    plan = walk(n, width, tokens, size, 2 * n + 1, n * width * (4 + slots * size), interpret)

    def body(refs):
        def scoped(gains, ready):
            plgpu.copy_gmem_to_smem(refs["gain"], gains, ready)
            plgpu.barrier_wait(ready)

            def step(index, loaded, stored, _):
                found = []
                for i in range(n):
                    dot, of_h, of_key = plan.zeros(), plan.zeros(), plan.zeros()
                    for at in plan.chunks():
                        x, k = plan.load(loaded["h"][i], at), plan.load(loaded["kv"][i], at)
                        dot += x * k * plan.load(gains, i * plan.rows + at)
                        of_h += x * x
                        of_key += k * k
                    inverse_h, inverse_key = (jax.lax.rsqrt(jnp.sum(squares) / width + norm_eps) for squares in (of_h, of_key))
                    score = jnp.sum(dot) * inverse_h * inverse_key * width**-0.5
                    found.append((score, inverse_h, inverse_key, gate(score)))
                out = stored()["out"]
                for at in plan.chunks():
                    value = plan.load(loaded["kv"][n], at)
                    for i in range(n):
                        added = plan.load(loaded["h"][i], at) + found[i][3] * value
                        out[i][pl.ds(at, plan.chunk), :] = added.astype(streams.dtype)
                for i in range(n):
                    for row, number in enumerate(found[i]):
                        refs["numbers"][row * n + i, plan.token(index)] = number
                return ()

            loads = {"h": plan.tile(refs["h"], n), "kv": plan.tile(refs["kv"], n + 1)}
            pipeline(step, plan.steps, loads, {"out": plan.tile(refs["out"], n)}, plan.stages, slots=slots)

        pl.run_scoped(scoped, plgpu.SMEM((n * plan.rows, LANES), jnp.float32), plgpu.Barrier())

    inputs = {"h": as_rows(streams), "kv": as_rows(keys_value), "gain": as_rows(gain)}
    outputs = {
        "out": jax.ShapeDtypeStruct(inputs["h"].shape, streams.dtype),
        "numbers": jax.ShapeDtypeStruct((4 * n, tokens), jnp.float32),
    }
    out = kernel(body, inputs, outputs, {"program": plan.programs}, interpret=interpret)
    return out["out"].reshape(streams.shape), out["numbers"][3 * n :], out["numbers"][: 3 * n]


def gate(score: Array) -> Array:
    """alpha of one score: the sigmoid of its signed root."""
    magnitude = jnp.maximum(jnp.abs(score), CLAMP)
    small = jnp.exp(-magnitude * jax.lax.rsqrt(magnitude))  # there is no square root in Mosaic GPU
    return jnp.where(score < 0, small, 1.0) / (1.0 + small)
