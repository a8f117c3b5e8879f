"""The hash in 32-bit pieces is that of Python integers, to the last bit."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles.ngrams import row_of

from mhc_jax.configs.engram import ENGRAM
from mhc_jax.data.ngrams.artifact import EngramArtifact
from mhc_jax.data.ngrams.hashing import NgramHash
from mhc_jax.engram_layout import multipliers, table_primes
from mhc_jax.nn.ngram_hash import hash_numbers, hashed_rows, remainder, wide_product

PRIMES = np.array([3, 5, 101, 65_537, 2_262_409, 16_000_057, 1_073_741_789, 2**31 - 1])


def halves(numbers: list[int]) -> tuple[jax.Array, jax.Array]:
    return (jnp.asarray(np.array([n >> 32 for n in numbers], np.uint32)), jnp.asarray(np.array([n % 2**32 for n in numbers], np.uint32)))


def extremes(rng: np.random.Generator, bits: int, count: int) -> list[int]:
    """Powers of two and their neighbours, and random numbers of every length."""
    near = [2**b + d for b in range(bits + 1) for d in (-1, 0, 1)]
    drawn = [int(rng.integers(0, 2**63)) >> int(rng.integers(63 - bits, 63)) for _ in range(count)]
    return [n for n in near + drawn if 0 <= n < 2**bits]


def test_products_are_exact():
    rng = np.random.default_rng(0)
    a, b = (rng.permutation(extremes(rng, 32, 2000)) for _ in range(2))
    count = min(len(a), len(b))
    a, b = (np.append(x[:count], 2**32 - 1) for x in (a, b))
    high, low = wide_product(jnp.asarray(a.astype(np.uint32)), jnp.asarray(b.astype(np.uint32)))
    products = (np.asarray(high).astype(object) << 32) + np.asarray(low).astype(object)  # of Python integers
    assert products.tolist() == [x * y for x, y in zip(a.tolist(), b.tolist())]


@pytest.mark.parametrize("prime", PRIMES.tolist())
def test_remainders_are_exact(prime):
    rng = np.random.default_rng(1)
    numbers = extremes(rng, 63, 2000)
    numbers += [q * prime + d for q in extremes(rng, (2**63 // prime).bit_length() - 1, 300) for d in (0, 1, prime - 1)]
    numbers = [n for n in numbers if n < 2**63]
    constants = hash_numbers(np.ones((1, 1), np.int64), np.array([[[prime]]]), np.zeros((1, 1), np.int64))
    p, inverse, square = (jnp.asarray(x.reshape(1)) for x in (constants.primes, constants.inverses, constants.squares))
    assert np.asarray(remainder(*halves(numbers), p, inverse, square)).tolist() == [n % prime for n in numbers]


@pytest.mark.parametrize("orders", [(2,), (2, 3), (3,), (2, 4), (2, 3, 4)])
def test_rows_are_those_of_python_integers_for_any_numbers(orders):
    rng = np.random.default_rng(2)
    length, limit = orders[-1], 2**18 - 1
    largest = (2**63 - 1) // limit
    factors = np.array([[largest - i for i in range(length)], rng.integers(1, largest, length), [1] * length], np.int64)
    primes = rng.choice(PRIMES[:-2], (3, len(orders), 5))
    flat = primes.reshape(3, -1)
    numbers = hash_numbers(factors, primes, np.cumsum(flat, axis=1) - flat)
    window = rng.integers(0, limit, (300, length), endpoint=True)
    window[:3] = [[limit] * length, [0] * length, [limit, *[0] * (length - 1)]]
    rows = np.asarray(jax.jit(partial(hashed_rows, orders=orders))(jnp.asarray(window, jnp.int32), numbers))
    assert rows.dtype == np.int32
    for of_window, of_token in zip(window.tolist(), rows):
        for layer in range(3):
            assert of_token[layer].tolist() == row_of(of_window, factors[layer].tolist(), primes[layer].tolist(), orders)


@pytest.mark.parametrize("name", ENGRAM)
def test_decoding_token_by_token_reads_the_rows_of_the_batch(name):
    config, classes = ENGRAM[name], 99_092
    artifact = EngramArtifact(config, "none", 2, np.arange(classes, dtype=np.int32), multipliers(config, classes), table_primes(config))
    numbers = hash_numbers(artifact.multipliers, artifact.primes, artifact.offsets)
    tokens = np.random.default_rng(3).integers(0, classes, (2, 20), np.int32)
    step = jax.jit(partial(hashed_rows, orders=config.orders))
    window = jnp.full((2, config.orders[-1]), artifact.pad, jnp.int32)
    expected = NgramHash(artifact).rows(tokens, np.ones_like(tokens))
    for t in range(tokens.shape[1]):
        window = jnp.concatenate([jnp.asarray(tokens[:, t : t + 1]), window[:, :-1]], axis=1)
        np.testing.assert_array_equal(step(window, numbers), expected[:, t])
