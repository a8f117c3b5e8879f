"""Multipliers and primes: those of the published models, and what the hash needs of any."""

import itertools
from math import isqrt

import numpy as np
import pytest

from mhc_jax.configs.engram import ENGRAM
from mhc_jax.engram_config import EngramConfig
from mhc_jax.engram_layout import is_prime, multipliers, table_primes
from mhc_jax.errors import UserError

CLASSES = 99_092  # of DeepSeek-V3's tokenizer


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("27b", [36_199_972, 36_204_260]),
        ("40b", [115_837_464, 115_841_428]),
        ("v4.1-flash", [384_006_168, 384_016_682]),  # engram_num_embeddings in its config.json
    ],
)
def test_rows_of_the_published_models(name, rows):
    assert table_primes(ENGRAM[name]).sum(axis=(1, 2)).tolist() == rows


def test_first_and_last_primes_of_v4_1_flash():
    primes = table_primes(ENGRAM["v4.1-flash"])
    assert primes[0, 0, :3].tolist() == [16_000_057, 16_000_079, 16_000_081]
    assert primes[1, -1, -1] == 16_000_889


def test_multipliers_of_v4_1_flash():
    assert multipliers(ENGRAM["v4.1-flash"], CLASSES).tolist() == [
        [76632096046245, 4839876093313, 35959672319349, 73987337458391],
        [67716810739261, 51510806800915, 30921347202721, 82619226485591],
    ]


def test_multipliers_depend_on_the_layer_counted_from_0():
    from_0 = EngramConfig(layers=(1, 14), table_sizes=(100, 100))
    from_1 = EngramConfig(layers=(2, 15), layer_base=1, table_sizes=(100, 100))
    np.testing.assert_array_equal(multipliers(from_0, CLASSES), multipliers(from_1, CLASSES))
    assert not np.array_equal(multipliers(from_0, CLASSES), multipliers(EngramConfig(layers=(2, 15), table_sizes=(100, 100)), CLASSES))


@pytest.mark.parametrize("classes", [1, 2, 3, 100, CLASSES, 2**22])
def test_multipliers_are_odd_and_products_fit_into_63_bits(classes):
    config = EngramConfig(layers=tuple(range(50)), table_sizes=(100,), orders=(8,), seed=3)
    drawn = multipliers(config, classes)
    assert drawn.shape == (50, 8)
    assert (drawn % 2 == 1).all()
    assert drawn.min() > 0
    assert int(drawn.max()) * (classes - 1) < 2**63


@pytest.mark.parametrize("start", [3, 100, 2_262_400])
def test_primes_are_the_next_ones_that_no_other_head_has(start):
    config = EngramConfig(layers=(0, 3, 4), table_sizes=(start, start + 50), orders=(2, 4), heads=5)
    primes = table_primes(config)
    taken: set[int] = set()
    for _, size_index in itertools.product(range(3), range(2)):
        for _ in range(5):
            candidate = config.table_sizes[size_index]
            while candidate in taken or not all(candidate % d for d in range(2, isqrt(candidate) + 1)):
                candidate += 1
            taken.add(candidate)
    assert sorted(taken) == sorted(primes.ravel().tolist())
    assert (np.diff(primes, axis=-1) > 0).all()


def test_primality_agrees_with_a_sieve_and_knows_pseudoprimes():
    sieve = np.ones(100_000, bool)
    sieve[:2] = False
    for n in range(2, 317):
        if sieve[n]:
            sieve[n * n :: n] = False
    assert [n for n in range(100_000) if is_prime(n)] == np.flatnonzero(sieve).tolist()
    # Strong pseudoprimes to the bases 2; 2 and 3; 2, 3 and 5 (Jaeschke 1993).
    assert not any(is_prime(n) for n in (2047, 1_373_653, 25_326_001))
    assert is_prime(2**31 - 1)


def test_more_rows_than_int32_can_number_are_refused():
    config = EngramConfig(layers=(0,), table_sizes=(2**31 - 1,), orders=(2,), heads=1)
    assert table_primes(config).tolist() == [[[2**31 - 1]]]
    with pytest.raises(UserError, match="gives 2147483659 rows in a layer"):
        table_primes(EngramConfig(layers=(0, 1), table_sizes=(2**31 - 1,), orders=(2,), heads=1))
