"""Wall time on the device that is here. The counterpart of `static_cost`, which models devices that are not."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

ROUND_SECONDS = 0.05  # calls are timed in rounds of about this length: a single call may be shorter than its launch
ROUNDS = 9
COPY_BYTES = 256 << 20


def measure_us(fn: Callable[..., Any], args: tuple[Any, ...]) -> float:
    """The wall time of one call of `fn`, compiled, in microseconds: the median over rounds of back-to-back calls.

    `args` are pytrees of arrays and of `jax.ShapeDtypeStruct`, which are filled with standard normal numbers, integers with zeros.
    """
    keys = iter(jax.random.split(jax.random.key(0), max(len(jax.tree.leaves(args)), 1)))
    values = jax.tree.map(lambda leaf: _filled(leaf, next(keys)), args)
    compiled = jax.jit(fn).lower(*values).compile()
    return _median_us(lambda: compiled(*values), jax.block_until_ready)


def measure_pytorch_us(call: Callable[[], Any]) -> float:
    """The same of a function that starts work on the GPU through PyTorch."""
    import torch

    return _median_us(call, lambda _: torch.cuda.synchronize())


def measure_copy_bandwidth() -> float:
    """Bytes a second that the device's memory moves when XLA adds a constant to an array: read and written bytes together."""
    elements = COPY_BYTES // 4
    us = measure_us(lambda x: x + 1.0, (jax.ShapeDtypeStruct((elements // 1024, 1024), jnp.float32),))
    return 2 * COPY_BYTES / (us / 1e6)


def _median_us(call: Callable[[], Any], wait: Callable[[Any], Any]) -> float:
    _time(call, wait, 1)  # warms up
    calls = max(1, int(ROUND_SECONDS / max(_time(call, wait, 1), 1e-6)))
    return 1e6 * statistics.median(_time(call, wait, calls) for _ in range(ROUNDS))


def _time(call: Callable[[], Any], wait: Callable[[Any], Any], calls: int) -> float:
    """Seconds a call over `calls` calls, from the first launch until the last result is there."""
    start = time.perf_counter()
    for _ in range(calls):
        result = call()
    wait(result)
    return (time.perf_counter() - start) / calls


def _filled(leaf: Any, key: jax.Array) -> jax.Array:
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return jnp.asarray(leaf)
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return jax.random.normal(key, leaf.shape, leaf.dtype)
    return jnp.zeros(leaf.shape, leaf.dtype)
