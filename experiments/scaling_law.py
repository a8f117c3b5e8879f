"""The parametric scaling law L(N, D) = E + A / N^alpha + B / D^beta and its fit: pure functions on arrays.

N parameters, D training tokens, L a loss in nats. Which parameters count is the caller's affair. Fitted as in Hoffmann et al. (arXiv
2203.15556, section 3.3 and appendix D.3): Huber loss on the residuals of log L, the law in logsumexp form, L-BFGS-B from a grid of initial
points. Two things differ. Logs of N and D are centred, without which A and alpha (B and beta) are nearly one direction, and the objective
is measured in units of delta squared and summed: as a mean it is so small that L-BFGS-B stops early, which is what Besiroglu et al. found
in the original (arXiv 2404.10102, appendix). Uncertainty is the part of scaling_bootstrap.
"""

from copy import copy
from dataclasses import dataclass

import numpy as np
from scipy.optimize import OptimizeResult, minimize

from mhc_jax.errors import UserError
from mhc_jax.experiments.scaling_search import huber, jacobian, search, terms

DELTA = 1e-3  # of the Huber loss, in log L
COEFFICIENTS = 5
LEAST_POINTS = COEFFICIENTS + 1  # different (N, D)
LEAST_LEVELS = 3  # different N, and different D: E and a power law have three coefficients
EXPONENTS = (0.01, 3.0)  # bounds of alpha and beta
STARTS = 60  # points of the grid that the search begins from, those of lowest objective
POLISHED = 3  # of what it finds, the best, which L-BFGS-B finishes


class TooFewPoints(UserError):
    """The data do not determine the law; the message says how many points would."""


@dataclass(frozen=True)
class Law:
    """Coefficients of the law; E in nats."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, parameters: np.ndarray | float, tokens: np.ndarray | float) -> np.ndarray:
        """L at N and D, nats; shapes broadcast."""
        a, b = np.log(self.A) - self.alpha * np.log(parameters), np.log(self.B) - self.beta * np.log(tokens)
        return np.asarray(self.E + np.exp(a) + np.exp(b))


@dataclass(frozen=True)
class Compute:
    """FLOPs of training as a power law, k N^p D: k = 6 and p = 1 is the rule of thumb."""

    k: float = 6.0
    p: float = 1.0

    def tokens(self, parameters: np.ndarray, flops: np.ndarray | float) -> np.ndarray:
        """Tokens that so many FLOPs pay for at N parameters."""
        return flops / (self.k * np.power(parameters, self.p))


def fit_compute(parameters: np.ndarray, flops_per_token: np.ndarray) -> Compute:
    """The power law through counted FLOPs a token, [sizes] each; least squares in logs."""
    p, log_k = np.polyfit(np.log(parameters), np.log(flops_per_token), 1)
    return Compute(float(np.exp(log_k)), float(p))


@dataclass(frozen=True)
class Optimum:
    """Where C FLOPs are spent best: N = G C^a and D = H C^b."""

    parameters: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray


def exponents(law: Law, compute: Compute) -> tuple[float, float]:
    """a and b of N_opt ~ C^a, D_opt ~ C^b; for p = 1, beta / (alpha + beta) and alpha / (alpha + beta) (arXiv 2203.15556, equation 4).

    Minimising the law under C = k N^p D gives alpha A N^-alpha = p beta B D^-beta.
    """
    total = law.alpha + compute.p * law.beta
    return law.beta / total, law.alpha / total


def optimum(law: Law, flops: np.ndarray | float, compute: Compute) -> Optimum:
    """Compute-optimal N, D and loss at C `flops`."""
    a, _ = exponents(law, compute)
    ratio = np.log(law.alpha * law.A) - np.log(compute.p * law.beta * law.B)
    parameters = np.exp(ratio / (law.alpha + compute.p * law.beta) + a * np.log(np.asarray(flops) / compute.k))
    tokens = compute.tokens(parameters, flops)
    return Optimum(parameters, tokens, law.loss(parameters, tokens))


def check_points(parameters: np.ndarray, tokens: np.ndarray, least: int = LEAST_POINTS) -> None:
    """Whether so many different points can determine the law.

    Raises:
      TooFewPoints: fewer than `least` different (N, D), or fewer than three different N or D.
    """
    points = len(set(zip(parameters.tolist(), tokens.tolist())))
    sizes, budgets = len(set(parameters.tolist())), len(set(tokens.tolist()))
    if points < least or min(sizes, budgets) < LEAST_LEVELS:
        raise TooFewPoints(
            f"the law needs at least {least} different points of at least {LEAST_LEVELS} sizes and {LEAST_LEVELS} numbers of tokens; "
            f"there are {points} points of {sizes} sizes and {budgets} numbers of tokens"
        )


def fit_law(parameters: np.ndarray, tokens: np.ndarray, losses: np.ndarray) -> Law:
    """The law of lowest Huber loss.

    Args:
      parameters, tokens, losses: [P] each, positive and finite. A point that stands there twice counts twice.

    Raises:
      TooFewPoints: as `check_points`.
      UserError: a value is not positive and finite.
    """
    parameters, tokens, losses = (np.asarray(array, np.float64) for array in (parameters, tokens, losses))
    if not all(np.all(np.isfinite(array) & (array > 0)) for array in (parameters, tokens, losses)):
        raise UserError("a scaling law is fitted to positive finite numbers; leave out runs without a finite loss")
    check_points(parameters, tokens)
    data = _Centred(parameters[None], tokens[None], losses[None])
    begins = data.grid()
    begins = begins[np.argsort([data.objective(begin)[0] for begin in begins])[:STARTS]]
    found, values = data.repeated(len(begins)).search(begins)
    best = min((data.polished(begin) for begin in found[np.argsort(values)[:POLISHED]]), key=lambda result: result.fun)
    return data.laws(best.x[None])[0]


def refit(near: Law, parameters: np.ndarray, tokens: np.ndarray, losses: np.ndarray) -> list[Law]:
    """The law of each of R resampled data sets, [R, P] arrays, searched from `near`, the law of all data.

    Whether each determines a law is the caller's check.
    """
    data = _Centred(parameters, tokens, losses)
    return data.laws(data.search(data.thetas(near))[0])


def huber_loss(law: Law, parameters: np.ndarray, tokens: np.ndarray, losses: np.ndarray) -> float:
    """What the fit minimises, in units of delta squared, summed over points; arrays are [P]."""
    u = np.log(law.loss(parameters, tokens) / losses) / DELTA
    return float(huber(u).sum())


class _Centred:
    """R data sets of P points in the search's coordinates."""

    def __init__(self, parameters: np.ndarray, tokens: np.ndarray, losses: np.ndarray):
        x, y, self.log_loss = np.log(parameters), np.log(tokens), np.log(losses)
        self.n, self.d = x.mean(axis=1), y.mean(axis=1)
        self.x, self.y = x - self.n[:, None], y - self.d[:, None]
        low, high = self.log_loss.min(axis=1), self.log_loss.max(axis=1)
        steep = np.ones_like(low)
        # E lies below every loss; a term of exp(-15) of the loss is none.
        self.low = np.stack([low - 15, low - 15, low - 15, EXPONENTS[0] * steep, EXPONENTS[0] * steep], axis=1)
        self.high = np.stack([low, high + 2, high + 2, EXPONENTS[1] * steep, EXPONENTS[1] * steep], axis=1)

    def repeated(self, times: int) -> "_Centred":
        """One data set so many times."""
        other = copy(self)
        for name, value in vars(self).items():
            setattr(other, name, np.repeat(value, times, axis=0))
        return other

    def search(self, begins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        begins = np.clip(begins, self.low, self.high)
        return search(begins, self.x, self.y, self.log_loss, self.low, self.high, DELTA)

    def objective(self, theta: np.ndarray) -> tuple[float, np.ndarray]:
        """Summed Huber loss of the first data set and its gradient."""
        fitted, shares = terms(theta, self.x[0], self.y[0])
        u = (fitted - self.log_loss[0]) / DELTA
        gradient = (jacobian(shares, self.x[0], self.y[0]) * np.clip(u, -1, 1)[None]).sum(axis=1) / DELTA
        return float(huber(u).sum()), gradient

    def polished(self, begin: np.ndarray) -> OptimizeResult:
        """L-BFGS-B on the first data set; begun again where it stopped, as its memory of an objective with corners goes stale."""
        options = {"maxiter": 2000, "maxfun": 20_000, "ftol": 1e-12, "gtol": 1e-9}
        bounds = list(zip(self.low[0], self.high[0]))
        best = minimize(self.objective, begin, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
        for _ in range(10):
            again = minimize(self.objective, best.x, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
            gained = best.fun - again.fun
            best = again if gained > 0 else best
            if gained <= 1e-6 * best.fun:
                break
        return best

    def grid(self) -> np.ndarray:
        """Initial points for the first data set, [starts, 5]: shares of the lowest loss for E, of what is left at the centre for the
        term of N, and exponents."""
        low, middle = np.exp(self.log_loss[0].min()), np.exp(self.log_loss[0].mean())
        powers = (0.1, 0.3, 0.6, 1.0, 1.8)
        return np.array(
            [
                [np.log(share * low), np.log(part * (middle - share * low)), np.log((1 - part) * (middle - share * low)), alpha, beta]
                for share in (0.05, 0.4, 0.7, 0.9, 0.98)
                for part in (0.1, 0.5, 0.9)
                for alpha in powers
                for beta in powers
            ]
        )

    def thetas(self, law: Law) -> np.ndarray:
        """A law in each data set's coordinates, [R, 5]."""
        one = np.ones_like(self.n)
        a, b = np.log(law.A) - law.alpha * self.n, np.log(law.B) - law.beta * self.d
        return np.stack([np.log(law.E) * one, a, b, law.alpha * one, law.beta * one], axis=1)

    def laws(self, theta: np.ndarray) -> list[Law]:
        """theta [R, 5] as laws."""
        e, a, b, alpha, beta = theta.T
        columns = (np.exp(e), np.exp(a + alpha * self.n), np.exp(b + beta * self.d), alpha, beta)
        return [Law(*row) for row in np.stack(columns, axis=1).tolist()]
