"""How far a fixed number of Sinkhorn steps is from convergence on random logits, measured in float64 as a yardstick for trained models.

This is a measurement in NumPy, independent of the model's own Sinkhorn.
"""

from functools import lru_cache

import numpy as np

STDS = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 10.0)


def column_errors(std: float, *, streams: int, steps: int, samples: int = 4000) -> np.ndarray:
    """Largest |column sum - 1| of each of `samples` random matrices after `steps` pairs of column and row normalisation.

    Logits are independent normal numbers of the given standard deviation (always the same draw). Rows are normalised last, so that row
    sums are exact and the columns carry the whole error.

    Returns:
      [samples], float64.
    """
    logits = std * np.random.default_rng(0).standard_normal((samples, streams, streams))
    matrix = np.exp(logits - logits.max(axis=(1, 2), keepdims=True))
    for _ in range(steps):
        matrix /= matrix.sum(axis=1, keepdims=True)
        matrix /= matrix.sum(axis=2, keepdims=True)
    return np.abs(matrix.sum(axis=1) - 1).max(axis=1)


@lru_cache
def reference_curve(streams: int, steps: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Median and 99th percentile of `column_errors` at each of STDS."""
    errors = [column_errors(std, streams=streams, steps=steps) for std in STDS]
    return tuple(float(np.median(e)) for e in errors), tuple(float(np.quantile(e, 0.99)) for e in errors)
