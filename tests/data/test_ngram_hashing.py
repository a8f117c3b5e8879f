"""Rows of batches: published vectors, Python integers, documents, and the remainders that are taken without dividing."""

import random

import numpy as np
import pytest
from ngrams_made import SMALL, made
from oracles.ngrams import row_of, window_at

from mhc_jax.configs.engram import ENGRAM
from mhc_jax.data.ngrams import hashing
from mhc_jax.data.ngrams.artifact import EngramArtifact
from mhc_jax.data.ngrams.hashing import NgramHash, Scratch, remainders
from mhc_jax.engram_config import EngramConfig
from mhc_jax.errors import UserError


def expected(artifact: EngramArtifact, tokens: np.ndarray, segments: np.ndarray | None) -> np.ndarray:
    """Rows by Python integers; segments None: n-grams cross documents."""
    orders = artifact.config.orders
    rows = np.empty((*tokens.shape, len(artifact.primes), artifact.primes[0].size), np.int32)
    for b, of_row in enumerate(artifact.lookup[tokens].tolist()):
        for t in range(len(of_row)):
            window = window_at(of_row, None if segments is None else segments[b].tolist(), t, orders[-1], artifact.pad)
            for layer, (factors, primes) in enumerate(zip(artifact.multipliers.tolist(), artifact.primes.tolist())):
                rows[b, t, layer] = row_of(window, factors, primes, orders)
    return rows


def random_batch(rng: np.random.Generator, vocab: int, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, and segments of which some come twice in a row of the batch, apart."""
    return rng.integers(0, vocab, shape, np.int32), np.sort(rng.integers(0, 4, shape, np.int32), axis=1) % 3


def test_golden_vectors_of_a_tiny_layout():
    artifact = made(SMALL, 100)
    assert artifact.multipliers.tolist() == [
        [58749346153885371, 24883432316446259, 3779140549244981],
        [75936276614146333, 4795930018386233, 35633158494689637],
    ]
    assert artifact.primes.tolist() == [[[101, 103], [107, 109]], [[113, 127], [131, 137]]]
    tokens = np.array([[5, 17, 42, 99]], np.int32)
    rows = NgramHash(artifact).rows(tokens, np.ones_like(tokens)) - artifact.offsets
    assert rows[0, :, 0].tolist() == [[53, 7, 44, 20], [6, 61, 8, 106], [76, 33, 28, 44], [95, 29, 97, 86]]
    assert rows[0, :, 1].tolist() == [[35, 112, 37, 120], [70, 46, 127, 115], [51, 1, 83, 69], [51, 69, 48, 100]]


def test_golden_vectors_of_v4_1_flash():
    artifact = made(ENGRAM["v4.1-flash"], 99_092)
    tokens = np.array([[5, 17, 42, 99_091]], np.int32)
    rows = NgramHash(artifact).rows(tokens, np.ones_like(tokens))
    local = (rows - artifact.offsets)[0, :, 0, [0, 1, 8, 9, 16, 17]].T
    assert local[0].tolist() == [5412672, 2319102, 15493752, 7788297, 350501, 4420638]
    assert local[3].tolist() == [9990907, 3873130, 9137136, 13688655, 3710625, 15149593]
    assert rows[0, 3, 0, 23] == 380_985_126


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        EngramConfig(layers=(1, 14), table_sizes=(9000, 20_000, 101), orders=(2, 3, 4), heads=3),  # by both ways of `remainders`
        EngramConfig(layers=(2,), table_sizes=(2_262_400, 16_000_000), orders=(3, 5), heads=8, seed=7),
        EngramConfig(layers=(0, 1, 2), table_sizes=(300_000_000,), orders=(2,), heads=1),
    ],
)
def test_rows_are_those_of_python_integers(config, cross, monkeypatch):
    monkeypatch.setattr(hashing, "CHUNK", 16)  # so that n-grams reach into the chunk before
    rng = np.random.default_rng(0)
    lookup = rng.permutation(np.append(np.arange(900), rng.integers(0, 900, 100))).astype(np.int32)
    config = EngramConfig(**{**vars(config), "cross_documents": cross})
    artifact = made(config, 900, pad=17, lookup=lookup)
    for shape in ((3, 50), (1, 1), (7, 2), (50, 1), (1, 16), (2, 17), (0, 5)):
        tokens, segments = random_batch(rng, 1000, shape)
        rows = NgramHash(artifact, threads=3).rows(tokens, segments)
        assert rows.dtype == np.int32
        np.testing.assert_array_equal(rows, expected(artifact, tokens, None if cross else segments))


def test_a_large_batch_and_any_number_of_threads_give_the_same_rows():
    rng = np.random.default_rng(1)
    artifact = made(ENGRAM["v4.1-flash"], 99_092)
    tokens, segments = random_batch(rng, 99_092, (5, 7000))
    rows = [NgramHash(artifact, threads).rows(tokens, segments) for threads in (1, 2, 5)]
    np.testing.assert_array_equal(rows[0], rows[1])
    np.testing.assert_array_equal(rows[0], rows[2])
    chosen = rng.integers(0, 7000, 50)
    for t in [0, 1, 2, 3, 8192 % 7000, 6999, *chosen.tolist()]:
        window = window_at(tokens[1].tolist(), None, t, 4, artifact.pad)
        assert rows[0][1, t, 1].tolist() == row_of(window, *(x[1].tolist() for x in (artifact.multipliers, artifact.primes)), (2, 3, 4))


def test_a_document_knows_nothing_of_the_one_before_unless_told_to():
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, 100, (4, 30), np.int32)
    other = tokens.copy()
    other[:, :10] = rng.integers(0, 100, (4, 10))
    other[:, 9] = (tokens[:, 9] + 1) % 100
    segments = np.where(np.arange(30) < 10, 1, 2) * np.ones((4, 1), np.int32)
    config = EngramConfig(layers=(0,), table_sizes=(10_000, 10_000))
    reset = NgramHash(made(config, 100))
    np.testing.assert_array_equal(reset.rows(tokens, segments)[:, 10:], reset.rows(other, segments)[:, 10:])
    alone = reset.rows(tokens[:, 10:], segments[:, 10:])
    np.testing.assert_array_equal(reset.rows(tokens, segments)[:, 10:], alone)

    crossing = NgramHash(made(EngramConfig(**{**vars(config), "cross_documents": True}), 100))
    differ = crossing.rows(tokens, segments) != crossing.rows(other, segments)
    assert differ[:, 10].any(axis=(-2, -1)).all()  # the first token of the second document: its 2-grams reach back
    assert not differ[:, 10 + 2 :].any()  # nothing reaches farther than 2 tokens back


@pytest.mark.parametrize("token", [-1, 100, 2**31 - 1])
def test_an_id_outside_the_vocabulary_is_refused(token):
    tokens = np.array([[5, token, 42, 99]], np.int32)
    with pytest.raises(UserError, match=f"token id {token} in a batch, but the tokenizer's ids are 0 to 99"):
        NgramHash(made(SMALL, 100)).rows(tokens, np.ones_like(tokens))


PRIMES = [3, 101, 8191, 8209, 65_537, 2_262_409, 16_000_057, 1_073_741_789, 2**31 - 1]


@pytest.mark.parametrize("prime", PRIMES)
def test_remainders_are_exact_where_rounding_is_worst(prime):
    """Around multiples of p and the middles between them, from 0 to 2^63, where the quotient could fall to either side."""
    rng = random.Random(prime)
    largest = (2**63 - 1) // prime
    quotients = {
        0,
        1,
        2,
        largest - 1,
        largest,
        *(min(2**bits, largest) for bits in range(63)),
        *(rng.randint(0, largest) for _ in range(3000)),
    }
    around = (-2, -1, 0, 1, 2, prime // 2 - 1, prime // 2, prime // 2 + 1, prime - 1)
    numbers = {q * prime + d for q in quotients for d in around} | {2**bits + d for bits in range(64) for d in (-1, 0, 1)}
    numbers = sorted(n for n in numbers if 0 <= n < 2**63)
    assert numbers[-1] == 2**63 - 1
    found = remainders(np.array(numbers, np.int64), np.array([prime]), Scratch(1, len(numbers)))
    np.testing.assert_array_equal(found[0], [n % prime for n in numbers])


def test_remainders_of_random_numbers_are_exact_for_all_heads():
    rng = np.random.default_rng(3)
    mix = rng.integers(0, 2**63 - 1, 30_000, np.int64, endpoint=True) >> rng.integers(0, 63, 30_000)
    primes = np.array([p for p in PRIMES if p >= hashing.SMALLEST_FAST])
    found = remainders(mix, primes, Scratch(len(primes), mix.size))
    for of_prime, p in zip(found.tolist(), primes.tolist()):
        assert of_prime == [n % p for n in mix.tolist()]
