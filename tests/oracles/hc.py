"""Hyper-Connections one token at a time, float64 NumPy, written from arXiv 2512.24880, Eq. 5."""

import numpy as np


def coefficients(x, theta_pre, theta_post, theta_res, b_pre, b_post, b_res, a_pre, a_post, a_res, eps):
    """pre [n], post [n], H_res [n, n] of one token's streams x [n, C]; each stream predicts its own column."""
    n = len(x)
    pre, post, res = np.empty(n), np.empty(n), np.empty((n, n))
    for j in range(n):
        normed = x[j] / np.sqrt(np.mean(x[j] ** 2) + eps)
        pre[j] = a_pre * np.tanh(theta_pre @ normed) + b_pre[j]
        post[j] = a_post * np.tanh(theta_post @ normed) + b_post[j]
        for i in range(n):
            res[i, j] = a_res * np.tanh(theta_res[i] @ normed) + b_res[i, j]
    return pre, post, res
