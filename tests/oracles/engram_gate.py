"""Engram's gate one token and one stream at a time, float64 NumPy, written from arXiv 2601.07372, Eq. 3-5.

Gradients are central differences: nothing here is derived by hand.
"""

from collections.abc import Callable

import numpy as np


def rms_norm(x: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x) + eps)


def alpha(h: np.ndarray, k: np.ndarray, query_gain: np.ndarray, key_gain: np.ndarray, eps: float) -> float:
    """The gate of one stream h [C] and its key k [C]."""
    s = (query_gain * rms_norm(h, eps)) @ (key_gain * rms_norm(k, eps)) / np.sqrt(len(h))
    root = np.sqrt(max(abs(s), 1e-6))
    return 1 / (1 + np.exp(-root if s >= 0 else root))


def gated(h: np.ndarray, keys: np.ndarray, value: np.ndarray, gain: np.ndarray, eps: float) -> np.ndarray:
    """alpha [T, n] of h and keys [T, n, C]; `gain` [n, C] counts as that of the query."""
    tokens, n, width = h.shape
    return np.array([[alpha(h[t, i], keys[t, i], gain[i], np.ones(width), eps) for i in range(n)] for t in range(tokens)])


def conv_add(h, keys, value, gain, weight, conv_gain, document, norm_eps: float, conv_eps: float) -> tuple[np.ndarray, np.ndarray]:
    """h + SiLU(Conv(RMSNorm(alpha v))) + alpha v [T, n, C], and alpha; `document` [T] numbers the documents, contiguous."""
    a = gated(h, keys, value, gain, norm_eps)
    out = np.array(h)
    for t in range(len(h)):
        for i in range(h.shape[1]):
            z = np.zeros(h.shape[2])
            for tap in range(4):
                source = t - 3 * tap
                if source >= 0 and document[source] == document[t]:
                    z += weight[tap, i] * conv_gain[i] * rms_norm(a[source, i] * value[source], conv_eps)
            out[t, i] += z / (1 + np.exp(-z)) + a[t, i] * value[t]
    return out, a


def add(h, keys, value, gain, norm_eps: float) -> tuple[np.ndarray, np.ndarray]:
    """h + alpha v [T, n, C], and alpha [T, n]."""
    a = gated(h, keys, value, gain, norm_eps)
    return h + a[:, :, None] * value[:, None], a


def slope(f: Callable[[float], float], step: float = 1e-6) -> float:
    """df/dx at 0."""
    return (f(step) - f(-step)) / (2 * step)
