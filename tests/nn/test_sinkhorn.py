"""Sinkhorn-Knopp against its oracle, finite differences, published error statistics, and inputs at the edge of the number range."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import mhc as oracle
from small import directional, relative

from pallas_kernels.mhc import sinkhorn


def logits(std: float, n: int = 4, count: int = 64, seed: int = 0) -> np.ndarray:
    return std * np.random.default_rng(seed).standard_normal((n, n, count))


def expected(x: np.ndarray, steps: int = 20) -> np.ndarray:
    return np.stack([oracle.sinkhorn(x[..., t], steps) for t in range(x.shape[-1])], axis=-1)


@pytest.mark.parametrize("std", [0.5, 1.0, 2.0, 4.0, 6.0])
def test_equals_the_oracle(float64, std):
    assert relative(sinkhorn(jnp.asarray(logits(std))), expected(logits(std))) < 1e-12


@pytest.mark.parametrize("std", [0.5, 1.0, 2.0, 4.0, 6.0])
def test_equals_the_oracle_in_float32(std):
    x = logits(std).astype(np.float32)
    # The logits' own rounding is removed by giving both the same; float32 keeps an exponential of 12 to 1e-6.
    assert relative(sinkhorn(jnp.asarray(x)), expected(x.astype(np.float64))) < 1e-5


@pytest.mark.parametrize("n", range(1, 9))
def test_any_number_of_streams(float64, n):
    assert relative(sinkhorn(jnp.asarray(logits(1.0, n, 8))), expected(logits(1.0, n, 8))) < 1e-12


@pytest.mark.parametrize("steps", [1, 2, 5, 50])
def test_any_number_of_steps(float64, steps):
    assert relative(sinkhorn(jnp.asarray(logits(3.0)), steps), expected(logits(3.0), steps)) < 1e-12


def test_one_stream_gives_exactly_one():
    assert np.all(np.asarray(sinkhorn(jnp.asarray(logits(5.0, n=1), jnp.float32))) == 1)


def test_rows_sum_to_one_where_columns_do_not(float64):
    m = np.asarray(sinkhorn(jnp.asarray(logits(6.0))))
    assert np.abs(m.sum(axis=1) - 1).max() < 1e-15 * 4
    assert np.abs(m.sum(axis=0) - 1).max() > 1e-2


@pytest.mark.parametrize(
    ("std", "median", "p99", "band"),
    [(1.0, 3e-13, 1.9e-6, 2.0), (2.0, 8e-7, 1.2e-2, 1.25), (4.0, 2.9e-3, 4.5e-2, 1.1)],
)
def test_column_error_after_20_steps_is_as_measured_elsewhere(float64, std, median, p99, band):
    """Statistics of 20,000 random matrices, measured independently in NumPy; the band covers sampling and the rounding of those figures."""
    m = sinkhorn(jnp.asarray(logits(std, count=20_000, seed=1)))
    error = np.abs(np.asarray(m).sum(axis=0) - 1).max(axis=0)
    for got, wanted in ((np.median(error), median), (np.quantile(error, 0.99), p99)):
        assert wanted / band < got < wanted * band


@pytest.mark.parametrize("std", [0.5, 2.0, 4.0])
def test_gradient_is_that_of_the_20_steps(float64, std):
    """Central differences; the gradient of the exact fixed point would be off by 1e-2 at standard deviation 4."""
    x, weight, direction = logits(std, count=4), logits(1.0, count=4, seed=2), logits(1.0, count=4, seed=3)

    def f(x):
        return (jnp.asarray(weight) * sinkhorn(jnp.asarray(x))).sum()

    slope = float((np.asarray(jax.grad(f)(jnp.asarray(x))) * direction).sum())
    assert slope == pytest.approx(directional(jax.jit(f), x, direction, 1e-3), rel=1e-7)


EDGES = {
    "equal": np.zeros((4, 4)),
    "all 200": np.full((4, 4), 200.0),
    "all -200": np.full((4, 4), -200.0),
    "diagonal 200": 400 * np.eye(4) - 200,
    "checkerboard": 200.0 * (-1) ** np.add.outer(np.arange(4), np.arange(4)),
    "vanishing row": np.where(np.arange(4)[:, None] == 0, -200.0, 0.0) * np.ones((4, 4)),
    "vanishing column": np.where(np.arange(4)[None] == 0, -200.0, 0.0) * np.ones((4, 4)),
    "row of 200": np.where(np.arange(4)[:, None] == 0, 200.0, 0.0) * np.ones((4, 4)),
    "one entry": np.where(np.arange(16).reshape(4, 4) == 6, 200.0, 0.0),
    "random": 200 * np.sign(logits(1.0, count=1)[..., 0]),
    "random std 100": logits(100.0, count=1)[..., 0],
}


@pytest.mark.parametrize("name", EDGES)
def test_extreme_logits_stay_finite_and_row_stochastic(name):
    x = jnp.asarray(EDGES[name], jnp.float32)[..., None]
    m, pull = jax.vjp(sinkhorn, x)
    grad = pull(jnp.asarray(logits(1.0, count=1), jnp.float32))[0]
    assert np.isfinite(m).all()
    assert np.isfinite(grad).all()
    assert np.abs(np.asarray(m).sum(axis=1) - 1).max() < 1e-6
