"""Rotary embedding and YaRN, float64 NumPy: a pair is a complex number, and the correction range is found by bisection on wavelengths."""

import math

import numpy as np


def pair_frequency(pair: float, dim: int, theta: float) -> float:
    return theta ** (-2 * pair / dim)


def pair_that_turns(times: float, dim: int, theta: float, length: int) -> float:
    """The (fractional) pair that makes this many turns within `length` positions."""
    low, high = -10.0 * dim, 10.0 * dim
    for _ in range(200):
        middle = (low + high) / 2
        if length * pair_frequency(middle, dim, theta) / (2 * math.pi) > times:
            low = middle
        else:
            high = middle
    return low


def yarn_frequencies(dim: int, theta: float, factor: float, length: int, fast: float, slow: float) -> np.ndarray:
    """arXiv 2309.00071 with the ramp over pair indices that DeepSeek's code uses."""
    first, last = math.floor(pair_that_turns(fast, dim, theta, length)), math.ceil(pair_that_turns(slow, dim, theta, length))
    first, last = max(first, 0), min(last, dim - 1)
    out = []
    for pair in range(dim // 2):
        f = pair_frequency(pair, dim, theta)
        if factor == 1 or pair <= first:
            out.append(f)
        elif pair >= last:
            out.append(f / factor)
        else:
            share = (pair - first) / (last - first)
            out.append((1 - share) * f + share * f / factor)
    return np.array(out)


def rotate(x: np.ndarray, position: float, frequencies: np.ndarray) -> np.ndarray:
    """One vector: pair (2i, 2i+1) is turned by position * frequencies[i]."""
    pairs = (x[0::2] + 1j * x[1::2]) * np.exp(1j * position * frequencies)
    out = np.empty_like(x)
    out[0::2], out[1::2] = pairs.real, pairs.imag
    return out
