"""The search for the coefficients of a scaling law: many data sets of P points, or many initial points of one, in one array.

Coordinates theta are log E, the logs of either term at the centre of the data, alpha, beta. The objective is the Huber loss of
u = (log L(theta) - log L) / delta, summed over points. Levenberg's damped Gauss-Newton steps on iteratively reweighted squares (a point of
|u| > 1 has weight 1 / |u|): for five coefficients and hundreds of resamples it takes a hundredth of what as many L-BFGS-B runs take, whose
library calls wait for each other's threads on a busy machine. What it returns is held to L-BFGS-B in tests.
"""

import numpy as np

STEPS = 400
SMALL = 1e-9  # relative gain of a step below which a problem counts as solved


def terms(theta: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log L and the shares of E and both terms in L, by logsumexp.

    Args:
      theta: [..., 5].
      x, y: [..., P], centred logs of N and D.

    Returns:
      [..., P] and [..., 3, P].
    """
    e, a, b, alpha, beta = (theta[..., k, None] for k in range(5))
    parts = np.stack([e + 0 * x, a - alpha * x, b - beta * y], axis=-2)
    largest = parts.max(axis=-2, keepdims=True)
    parts = np.exp(parts - largest)
    total = parts.sum(axis=-2, keepdims=True)
    return (largest + np.log(total))[..., 0, :], parts / total


def jacobian(shares: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Derivatives of log L by theta, [..., 5, P]."""
    e, a, b = shares[..., 0, :], shares[..., 1, :], shares[..., 2, :]
    return np.stack([e, a, b, -x * a, -y * b], axis=-2)


def huber(u: np.ndarray) -> np.ndarray:
    """u^2 / 2 up to 1, |u| - 1/2 beyond."""
    slope = np.clip(u, -1, 1)
    return slope * (u - slope / 2)


def search(
    theta: np.ndarray, x: np.ndarray, y: np.ndarray, log_loss: np.ndarray, low: np.ndarray, high: np.ndarray, delta: float
) -> tuple[np.ndarray, np.ndarray]:
    """From each initial point to the lowest objective near it.

    Args:
      theta: [R, 5], initial points, within the bounds.
      x, y, log_loss: [R, P].
      low, high: [R, 5] bounds.

    Returns:
      theta [R, 5] and the objective [R].
    """
    damping = np.full(len(theta), 1e-2)
    value, step = _step(theta, x, y, log_loss, low, high, delta, damping)
    waited = np.zeros(len(theta), int)
    for _ in range(STEPS):
        tried = np.clip(theta + step, low, high)
        new = huber((terms(tried, x, y)[0] - log_loss) / delta).sum(axis=-1)
        better = new < value
        waited = np.where(value - new > SMALL * value, 0, waited + 1)
        theta = np.where(better[:, None], tried, theta)
        damping = np.clip(np.where(better, damping / 4, damping * 6), 1e-12, 1e12)
        if (waited > 20).all():
            break
        value, step = _step(theta, x, y, log_loss, low, high, delta, damping)
    return theta, value


def _step(theta, x, y, log_loss, low, high, delta, damping) -> tuple[np.ndarray, np.ndarray]:
    """The objective and the damped step; a coefficient at a bound that it pushes against stays there."""
    fitted, shares = terms(theta, x, y)
    u = (fitted - log_loss) / delta
    j = jacobian(shares, x, y) / delta
    gradient = (j * np.clip(u, -1, 1)[:, None]).sum(axis=-1)
    weights = 1 / np.maximum(1, np.abs(u))
    hessian = np.einsum("rip,rjp->rij", j * weights[:, None], j)
    held = ((theta <= low) & (gradient > 0)) | ((theta >= high) & (gradient < 0))
    free = np.where(held, 0.0, 1.0)
    hessian = hessian * free[:, :, None] * free[:, None]
    scale = np.einsum("rii->ri", hessian)
    diagonal = damping[:, None] * scale + np.where(scale > 0, 1e-12 * scale, 1.0)
    hessian = hessian + np.eye(5)[None] * diagonal[:, None]
    return huber(u).sum(axis=-1), -np.linalg.solve(hessian, (gradient * free)[..., None])[..., 0]
