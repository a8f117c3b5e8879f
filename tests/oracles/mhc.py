"""mHC one token at a time, float64 NumPy, written from arXiv 2512.24880, Eq. 3 and 7-9.

The library holds one matrix phi [K, n*C] for all mappings; here it is the paper's three, [n*C, n], [n*C, n] and [n*C, n*n].
"""

from typing import NamedTuple

import numpy as np


def sinkhorn(logits: np.ndarray, steps: int) -> np.ndarray:
    """One [n, n] matrix: exp, then columns over their sums and rows over theirs, in that order, `steps` times."""
    n = len(logits)
    m = np.empty((n, n))
    for i in range(n):
        for j in range(n):
            m[i, j] = np.exp(logits[i, j])
    for _ in range(steps):
        for j in range(n):
            m[:, j] = m[:, j] / m[:, j].sum()
        for i in range(n):
            m[i, :] = m[i, :] / m[i, :].sum()
    return m


class Weights(NamedTuple):
    phi_pre: np.ndarray  # [n*C, n]
    phi_post: np.ndarray  # [n*C, n]
    phi_res: np.ndarray  # [n*C, n*n]
    b_pre: np.ndarray
    b_post: np.ndarray
    b_res: np.ndarray  # [n, n]
    a_pre: float
    a_post: float
    a_res: float


def coefficients(x: np.ndarray, w: Weights, steps: int, eps: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """pre [n], post [n], H_res [n, n] of one token's streams x [n, C]."""
    n = len(x)
    v = np.concatenate(list(x))
    normed = v / np.sqrt(np.mean(v * v) + eps)
    pre_logits = w.a_pre * (normed @ w.phi_pre) + w.b_pre
    post_logits = w.a_post * (normed @ w.phi_post) + w.b_post
    res_logits = w.a_res * (normed @ w.phi_res).reshape(n, n) + w.b_res
    return 1 / (1 + np.exp(-pre_logits)), 2 / (1 + np.exp(-post_logits)), sinkhorn(res_logits, steps)


def sublayer(x: np.ndarray, f, pre: np.ndarray, post: np.ndarray, res: np.ndarray) -> np.ndarray:
    """x' = H_res x + post^T F(pre x), for one token's streams [n, C] (Eq. 3)."""
    return res @ x + np.outer(post, f(pre @ x))
