"""The names that `model.residual` can have, and what is known of each without its code: what a config checks and a plan counts.

The code of a kind is a part, `mhc_jax.nn.residual`; `mhc_jax.nn.residual.register` adds to both.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import factorial

MOST_COLUMNS = 1000  # coefficients a token; n! permutations pass it at 7 streams


@dataclass(frozen=True)
class ResidualKind:
    """What is known of a kind; n is the number of streams."""

    columns: Callable[[int], int]  # coefficients predicted from a token, each from all n*C entries
    mixes: bool = True  # False: H_res is the identity
    bounded: bool = False  # rows of H_res sum to one and no entry is negative, so that no composite gain is above n
    res_flops: Callable[[int, int], int] = lambda n, sinkhorn_steps: 0  # FLOPs a token from the logits of H_res to H_res


def prime_factors(n: int) -> tuple[int, ...]:
    """The prime factors of n, rising; none of 1."""
    for p in range(2, n + 1):
        if n % p == 0:
            return (p, *prime_factors(n // p))
    return ()


KINDS: dict[str, ResidualKind] = {
    "residual": ResidualKind(lambda n: 0, mixes=False, bounded=True),
    "hc": ResidualKind(lambda n: n + 2),
    "static_hc": ResidualKind(lambda n: 0),
    "mhc": ResidualKind(lambda n: n * (n + 2), bounded=True, res_flops=lambda n, steps: 4 * n * n * steps),
    "identity_hc": ResidualKind(lambda n: 2 * n, mixes=False, bounded=True),
    "mhc_lite": ResidualKind(lambda n: 2 * n + factorial(n), bounded=True, res_flops=lambda n, steps: 2 * n * n * factorial(n)),
    "kromhc": ResidualKind(
        lambda n: 2 * n + sum(map(factorial, prime_factors(n))),
        bounded=True,
        res_flops=lambda n, steps: sum(2 * p * p * factorial(p) for p in prime_factors(n)) + n * n,
    ),
}
