"""The gate without convolution on GPU, backward: the arithmetic of `tpu.backward`, a token at a time, each read once.

The gradient of the gain is summed over a program's tokens in registers; XLA adds the programs' shares.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.engram_gate.gpu.forward import gate
from pallas_kernels.engram_gate.gpu.rows import LANES, as_rows, walk
from pallas_kernels.engram_gate.spec import CLAMP
from pallas_kernels.gpu.launch import kernel, pipeline

Array = jax.Array


def gate_add_backward(
    streams: Array, keys_value: Array, gain: Array, saved: Array, d_out: Array, d_alpha: Array, *, interpret: bool = False
) -> tuple[Array, Array, Array]:
    """Gradients for streams and keys_value, in their type, and for gain, float32. Raises as the forward pass."""
    (tokens, _), (n, width), dtype = streams.shape, gain.shape, streams.dtype
    other = n * width * 4 + (2 * n + 1) * width * dtype.itemsize
    plan = walk(n, width, tokens, dtype.itemsize, 3 * n + 1, other, interpret)
    chunks = plan.chunks()

    def body(refs):
        def scoped(gains, ready):
            plgpu.copy_gmem_to_smem(refs["gain"], gains, ready)
            plgpu.barrier_wait(ready)

            def step(index, loaded, stored, d_gains):
                token, own = plan.token(index), plan.taken(index) < tokens
                h, kv, d = loaded["h"], loaded["kv"], loaded["d_out"]
                sums = [plan.zeros() for _ in range(n)]
                for at in chunks:
                    value = plan.load(kv[n], at)
                    sums = [total + plan.load(d[i], at) * value for i, total in enumerate(sums)]
                factors = []
                for i in range(n):
                    score, inverse_h, inverse_key, more = (refs["numbers"][k * n + i, token] for k in range(4))
                    alpha, magnitude = gate(score), jnp.maximum(jnp.abs(score), CLAMP)
                    slope = jnp.where(magnitude > CLAMP, 0.5 * alpha * (1 - alpha) * jax.lax.rsqrt(magnitude), 0.0)
                    d_score = (jnp.sum(sums[i]) + more) * slope
                    shrink = d_score * score * (-1 / width)
                    product = d_score * inverse_h * inverse_key * width**-0.5
                    factors.append((alpha, product, shrink * inverse_h * inverse_h, shrink * inverse_key * inverse_key))
                out = stored()
                d_gains = list(d_gains)
                for c, at in enumerate(chunks):
                    rows, d_value = pl.ds(at, plan.chunk), plan.zeros()
                    for i, (alpha, product, by_h, by_key) in enumerate(factors):
                        x, k, d_x, g = (plan.load(ref, at) for ref in (h[i], kv[i], d[i], gains.at[pl.ds(i * plan.rows, plan.rows)]))
                        d_value += alpha * d_x
                        weighted = product * x
                        out["dh"][i][rows, :] = (d_x + product * (k * g) + by_h * x).astype(dtype)
                        out["dkv"][i][rows, :] = (weighted * g + by_key * k).astype(dtype)
                        share = i * len(chunks) + c
                        d_gains[share] = jnp.where(own, d_gains[share] + weighted * k, d_gains[share])
                    out["dkv"][n][rows, :] = d_value.astype(dtype)
                return d_gains

            loads = {"h": plan.tile(refs["h"], n), "kv": plan.tile(refs["kv"], n + 1), "d_out": plan.tile(refs["d_out"], n)}
            stores = {"dh": plan.tile(refs["dh"], n), "dkv": plan.tile(refs["dkv"], n + 1)}
            zeros = [plan.zeros() for _ in range(n * len(chunks))]
            d_gains = pipeline(step, plan.steps, loads, stores, plan.stages, slots=1, carry=zeros)
            for share, total in enumerate(d_gains):
                refs["d_gain"][jax.lax.axis_index("program"), pl.ds(share * plan.chunk, plan.chunk), :] = total

        pl.run_scoped(scoped, plgpu.SMEM((n * plan.rows, LANES), jnp.float32), plgpu.Barrier())

    inputs = {"h": as_rows(streams), "kv": as_rows(keys_value), "d_out": as_rows(d_out), "gain": as_rows(gain)}
    outputs = {
        "dh": jax.ShapeDtypeStruct(inputs["h"].shape, dtype),
        "dkv": jax.ShapeDtypeStruct(inputs["kv"].shape, dtype),
        "d_gain": jax.ShapeDtypeStruct((plan.programs, n * plan.rows, LANES), jnp.float32),
    }
    inputs["numbers"] = jnp.concatenate([saved, d_alpha])
    out = kernel(body, inputs, outputs, {"program": plan.programs}, interpret=interpret)
    d_gain = out["d_gain"].sum(axis=0).reshape(n, width)
    return out["dh"].reshape(streams.shape), out["dkv"].reshape(keys_value.shape), d_gain
