"""Doubly stochastic matrices of one token by construction, float64 NumPy, written from arXiv 2601.05732 and 2601.21579."""

from itertools import permutations

import numpy as np


def softmax(z: np.ndarray) -> np.ndarray:
    return np.exp(z) / np.exp(z).sum()


def mhc_lite(logits: np.ndarray, n: int) -> np.ndarray:
    """[n, n] from n! logits: each permutation, row by row, adds its weight where it has a one."""
    res = np.zeros((n, n))
    for weight, places in zip(softmax(logits), permutations(range(n)), strict=True):
        for row, column in enumerate(places):
            res[row, column] += weight
    return res


# Factors of KromHC by the number of streams, and how many permutations each has.
FACTORS: dict[int, list[tuple[int, int]]] = {1: [], 2: [(2, 2)], 3: [(3, 6)], 4: [(2, 2)] * 2, 6: [(2, 2), (3, 6)], 8: [(2, 2)] * 3}


def kromhc(logits: np.ndarray, n: int) -> np.ndarray:
    """[n, n]: the Kronecker product of one small matrix for each factor."""
    res, at = np.ones((1, 1)), 0
    for size, count in FACTORS[n]:
        own = logits[at : at + count]
        if size == 2:
            stay = 1 / (1 + np.exp(own[1] - own[0]))
            factor = np.array([[stay, 1 - stay], [1 - stay, stay]])
        else:
            factor = mhc_lite(own, size)
        res, at = np.kron(res, factor), at + count
    assert at == len(logits)
    return res
