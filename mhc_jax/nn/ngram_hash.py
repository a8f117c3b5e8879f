"""Rows of Engram's tables on the device, for decoding, where the next token is known only there. Training takes them from the batch.

Bit for bit the hash of data/ngrams/hashing (arXiv 2601.07372, equations 1 and 2), which needs 64-bit products and remainders. JAX has no
64-bit integers by default, and turns them into 32 bits without a word; so everything here is pairs of uint32.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int32, Int64, Shaped, UInt32

LOW = np.uint32(0xFFFF)


class HashNumbers(NamedTuple):
    """Multipliers and primes in 32-bit pieces, layer by layer; a pytree of small arrays."""

    multiplier_high: UInt32[np.ndarray, "layers lookback"]
    multiplier_low: UInt32[np.ndarray, "layers lookback"]
    primes: UInt32[np.ndarray, "layers orders heads"]
    inverses: UInt32[np.ndarray, "layers orders heads"]  # -1/p modulo 2^32
    squares: UInt32[np.ndarray, "layers orders heads"]  # 2^64 modulo p
    offsets: UInt32[np.ndarray, "layers orders heads"]


def hash_numbers(
    multipliers: Int64[np.ndarray, "layers lookback"],
    primes: Int64[np.ndarray, "layers orders heads"],
    offsets: Int64[np.ndarray, "layers all_heads"],
) -> HashNumbers:
    """The numbers of an artifact (data/ngrams/artifact) as the device needs them; the primes must be odd and below 2^31."""
    wide = multipliers.astype(np.uint64)
    each = primes.reshape(-1).tolist()
    inverses = np.array([-pow(p, -1, 2**32) % 2**32 for p in each], np.uint32)
    squares = np.array([2**64 % p for p in each], np.uint32)
    return HashNumbers(
        multiplier_high=(wide >> np.uint64(32)).astype(np.uint32),
        multiplier_low=wide.astype(np.uint32),
        primes=primes.astype(np.uint32),
        inverses=inverses.reshape(primes.shape),
        squares=squares.reshape(primes.shape),
        offsets=offsets.astype(np.uint32).reshape(primes.shape),
    )


def hashed_rows(
    window: Int[Array, "*batch lookback"], numbers: HashNumbers, orders: tuple[int, ...]
) -> Int32[Array, "*batch layers heads"]:
    """The row of each layer's table that each head of each token reads, offsets included; heads of the first order come first.

    Args:
      window: classes (compressed ids) of the token, of the one before it, and so on, as far back as the longest order; the padding class
        where there is none.
      numbers: see `hash_numbers`.
      orders: lengths of the n-grams, rising; the last one is the length of the window.
    """
    ids = window.astype(jnp.uint32)[..., None, :]  # [..., 1, lookback]
    shape = (1,) * (window.ndim - 1)
    low_factor, high_factor = (jnp.asarray(m).reshape(shape + m.shape) for m in (numbers.multiplier_low, numbers.multiplier_high))
    carry, low = wide_product(ids, low_factor)
    high = carry + ids * high_factor
    of_orders = []
    mix_high, mix_low = high[..., 0], low[..., 0]
    for order in range(2, orders[-1] + 1):
        mix_high, mix_low = mix_high ^ high[..., order - 1], mix_low ^ low[..., order - 1]
        if order in orders:
            of_orders.append((mix_high, mix_low))
    mix_high, mix_low = (jnp.stack(parts, axis=-1)[..., None] for parts in zip(*of_orders))  # [..., layers, orders, 1]
    primes, inverses, squares, offsets = (jnp.asarray(x).reshape(shape + x.shape) for x in numbers[2:])
    rows = remainder(mix_high, mix_low, primes, inverses, squares) + offsets
    return rows.reshape(*rows.shape[:-2], -1).astype(jnp.int32)


def next_rows(
    classes: Int[Array, "B S"], before: Int[Array, "B before"], count: Int[Array, "B"], numbers: HashNumbers, orders: tuple[int, ...]
) -> tuple[Int32[Array, "B S layers heads"], Int[Array, "B before"]]:
    """The rows of the next S tokens of every sequence, and what to give as `before` for those after the first `count` of them.

    `before` holds the classes of the tokens before, the newest last; the padding class before the first token of a document.
    """
    length, lookback = classes.shape[1], orders[-1]
    seen = jnp.concatenate([before, classes], axis=1)
    window = jnp.stack([seen[:, lookback - 1 - back :][:, :length] for back in range(lookback)], axis=-1)
    return hashed_rows(window, numbers, orders), newest(seen, count, lookback - 1)


def newest(past: Shaped[Array, "B past *more"], count: Int[Array, "B"], keep: int) -> Shaped[Array, "B {keep} *more"]:
    """Of each sequence the last `keep` entries up to its first `count` new ones: S are new in `past`, `keep` stood there before."""
    return jax.vmap(partial(jax.lax.dynamic_slice_in_dim, slice_size=keep))(past, count)


def remainder(high: Array, low: Array, primes: Array, inverses: Array, squares: Array) -> Array:
    """(high 2^32 + low) mod p, exactly, for high below 2^31 and odd p below 2^31; all uint32, shapes that broadcast.

    Montgomery's reduction (Mathematics of Computation 44, 1985) divides by 2^32 modulo p, with products only. The first one gives some
    number below 2^32 that is right modulo p. The second, of its product with 2^64 mod p, which is below 2^32 p, removes the factor 1/2^32
    and gives a number below 2 p.
    """
    once = _reduced(high, low, primes, inverses)
    twice = _reduced(*wide_product(once, squares), primes, inverses)
    return jnp.where(twice >= primes, twice - primes, twice)


def wide_product(a: Array, b: Array) -> tuple[Array, Array]:
    """The high and the low 32 bits of a product of uint32."""
    a_low, a_high, b_low, b_high = a & LOW, a >> 16, b & LOW, b >> 16
    low, cross = a_low * b_low, a_high * b_low
    middle = a_low * b_high + (low >> 16) + (cross & LOW)  # at most (2^16 - 1)^2 + 2 (2^16 - 1) = 2^32 - 1
    return a_high * b_high + (cross >> 16) + (middle >> 16), a * b


def _reduced(high: Array, low: Array, primes: Array, inverses: Array) -> Array:
    """x/2^32 modulo p, for x = high 2^32 + low: below high + p + 1. Adding the right multiple of p makes the low half zero."""
    carried, _ = wide_product(low * inverses, primes)  # its low half is -low; carried is below p
    return high + carried + (low != 0).astype(jnp.uint32)
