"""A number for every array of a pytree, computed where the array lies, that changes when a bit of it does.

Storage that returns wrong bytes without an error is noticed by comparing these numbers before and after. They are no defence against
somebody who changes arrays on purpose.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, UInt32

WORDS_AT_ONCE = 2**20  # of an array in host memory: they stay in the cache


def fingerprints(tree: Any) -> dict[str, int]:
    """A 32-bit number for every array, by its path in the tree. JAX's arrays are done by one compiled program, whatever their sharding.

    Equal arrays have equal numbers on every kind of device and mesh, and as NumPy's arrays of four-byte numbers; zeros after the last row
    change nothing. One changed word always changes the number; of changes to several
    words, one in 2^32 goes unnoticed.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    on_devices = [leaf for _, leaf in leaves if not isinstance(leaf, np.ndarray)]
    numbers = iter(np.asarray(_all(on_devices)) if on_devices else ())
    return {
        jax.tree_util.keystr(path): _fingerprint_on_host(leaf) if isinstance(leaf, np.ndarray) else int(next(numbers))
        for path, leaf in leaves
    }


@jax.jit
def _all(arrays: list[Array]) -> UInt32[Array, " arrays"]:
    return lax.concatenate([lax.expand_dims(_fingerprint(array), [0]) for array in arrays], 0)


@jax.jit  # parameters and moments of one shape are traced once
def _fingerprint(x: Array) -> UInt32[Array, ""]:
    """Sum modulo 2^32 of the array's words, each times an odd number that depends on its position.

    The position is made of one counter an axis, so that a split array need not be gathered or reshaped. Odd factors have inverses modulo
    2^32: no single word can change without changing the sum.
    """
    words = _words(x)
    shape, strides = words.shape, np.cumprod((1, *words.shape[:0:-1]), dtype=np.uint32)[::-1]
    factor = lax.full(shape, 1, np.uint32)
    for axis, stride in enumerate(strides[: len(shape)]):
        factor = factor + lax.broadcasted_iota(np.uint32, shape, axis) * (2 * stride)
    return lax.reduce(words * factor, np.uint32(0), lax.add, range(len(shape)))


def _fingerprint_on_host(x: np.ndarray) -> int:
    """The same number, without a copy of the array."""
    if x.dtype.itemsize != 4:
        raise ValueError(f"an array in host memory is {x.dtype}; it must be of four-byte numbers")
    words, total = np.ascontiguousarray(x).reshape(-1).view(np.uint32), 0
    for start in range(0, len(words), WORDS_AT_ONCE):
        part = words[start : start + WORDS_AT_ONCE]
        factor = np.arange(start, start + len(part), dtype=np.uint64).astype(np.uint32) * np.uint32(2) + np.uint32(1)
        total += int(np.sum(part * factor, dtype=np.uint32))
    return total % 2**32


def _words(x: Array) -> UInt32[Array, "..."]:
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    width = min(x.dtype.itemsize, 4)  # eight bytes become two words along a new last axis
    return lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[width]).astype(jnp.uint32)
