"""The numbers that define the hash: multipliers and primes (arXiv 2601.07372, section 2.2; their exact values from the published code).

Released tables fit these numbers and no others. They are made once, and kept by the artifact.
"""

from functools import cache

import numpy as np
from jaxtyping import Int64

from mhc_jax.engram_config import ROWS_LIMIT, EngramConfig
from mhc_jax.errors import UserError

LAYER_STEP = 10_007  # between the seeds of the layers
LARGEST_INT64 = 2**63 - 1


def multipliers(config: EngramConfig, classes: int) -> Int64[np.ndarray, "layers lookback"]:
    """Odd numbers, one for each layer and distance back, so small that (number of a class) x multiplier is below 2^63.

    Args:
      config: the fields layers, layer_base, orders and seed are used.
      classes: V', how many classes of tokens there are.
    """
    bound = max(1, LARGEST_INT64 // classes // 2)
    drawn = [np.random.default_rng(config.seed + LAYER_STEP * i).integers(0, bound, config.orders[-1], np.int64) for i in config.layer_ids]
    return 2 * np.stack(drawn) + 1


def table_primes(config: EngramConfig) -> Int64[np.ndarray, "layers orders heads"]:
    """Rows of each table: rising primes from the order's table size on, all different over all layers, orders and heads.

    Raises:
      UserError: a layer has more rows than int32 can number.
    """
    seen: set[int] = set()
    primes = np.empty((len(config.layers), len(config.orders), config.heads), np.int64)
    for of_layer in primes:
        for of_order, size in zip(of_layer, config.table_sizes):
            candidate = size
            for head in range(config.heads):
                while candidate in seen or not is_prime(candidate):
                    candidate += 1
                seen.add(candidate)
                of_order[head] = candidate
    if (rows := int(primes.sum(axis=(1, 2)).max())) >= ROWS_LIMIT:
        raise UserError(f"model.engram.table_sizes gives {rows} rows in a layer; fewer than {ROWS_LIMIT} are supported, lower it")
    return primes


@cache
def table_rows(config: EngramConfig) -> tuple[int, ...]:
    """Rows of each layer's one table, in which its heads' tables stand one after the other; without padding."""
    return tuple(int(rows) for rows in table_primes(config).sum(axis=(1, 2)))


def is_prime(n: int) -> bool:
    """Whether n is prime; n below 3,215,031,751, up to which the Miller-Rabin test with four bases is exact (Jaeschke 1993)."""
    bases = (2, 3, 5, 7)
    if n < 2 or any(n % base == 0 for base in bases):
        return n in bases
    twos = ((n - 1) & (1 - n)).bit_length() - 1  # n - 1 is odd times 2^twos
    return all(_passes(n, base, twos) for base in bases)


def _passes(n: int, base: int, twos: int) -> bool:
    x = pow(base, (n - 1) >> twos, n)
    if x in (1, n - 1):
        return True
    for _ in range(twos - 1):
        x = x * x % n
        if x == n - 1:
            return True
    return False
