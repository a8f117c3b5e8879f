"""Random seams and what float64 makes of them. Streams are rounded where an implementation rounds them: x' before it is read."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.mhc import Mapping, Weights, reference

Arrays = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """A seam and cotangents for what it returns."""

    mapping: Mapping
    x: jax.Array
    y: jax.Array
    h: jax.Array
    weights: Weights
    cotangents: tuple[jax.Array, jax.Array, jax.Array]


def problem(
    mapping: Mapping, tokens: int = 40, width: int = 128, dtype: Any = jnp.float32, logit_std: float = 1.5, seed: int = 0
) -> Problem:
    """Streams of unit scale and logits of the given standard deviation, of which phi makes most."""
    rng = np.random.default_rng(seed)
    n, rows = mapping.n, mapping.rows

    def normal(*shape: int, std: float = 1.0, kind: Any = jnp.float32) -> jax.Array:
        return jnp.asarray(std * rng.standard_normal(shape), kind)

    alpha = jnp.asarray(rng.uniform(0.5, 1.5, len(mapping.groups)), jnp.float32)
    weights = Weights(normal(rows, n * width, std=logit_std * (n * width) ** -0.5), alpha, normal(rows, std=0.3 * logit_std))
    h = np.concatenate(
        [
            rng.uniform(0, 1, (n, tokens)),
            rng.uniform(0, 2, (n, tokens)),
            rng.dirichlet(np.ones(n), (n, tokens)).transpose(0, 2, 1).reshape(n * n, tokens),
        ]
    )
    x, y = normal(tokens, n * width, kind=dtype), normal(tokens, width, kind=dtype)
    cotangents = (normal(tokens, n * width, kind=dtype), normal(tokens, width, kind=dtype), normal(rows, tokens, std=width**0.5))
    return Problem(mapping, x, y, jnp.asarray(h[:rows], jnp.float32), weights, cotangents)


def oracle(p: Problem) -> tuple[Arrays, Arrays]:
    """Outputs and gradients of the whole seam in float64, by name."""
    with jax.enable_x64(True):
        x, y, h, weights, cotangents = jax.tree.map(
            lambda a: jnp.asarray(np.asarray(a, np.float64)), (p.x, p.y, p.h, p.weights, p.cotangents)
        )
        between, pull_post = jax.vjp(lambda *a: reference.mhc_post(*a, p.mapping), x, y, h)
        between = jnp.asarray(np.asarray(between.astype(p.x.dtype), np.float64))
        previous = h if p.mapping.reads == "previous" else None
        (u, h_next), pull_pre = jax.vjp(lambda x, w, h: reference.mhc_pre(x, w, p.mapping, h), between, weights, previous)
        d_between, d_weights, d_previous = pull_pre(cotangents[1:])
        dx, dy, dh = pull_post(cotangents[0] + d_between)
        if d_previous is not None:
            dh = dh + d_previous
        outputs = {"between": between, "u": u, "h": h_next}
        return jax.tree.map(np.asarray, (outputs, {"x": dx, "y": dy, "h": dh, **gradients_of(d_weights)}))


def gradients_of(weights: Weights) -> Arrays:
    """Gradients of the weights by name."""
    return {"phi": weights.phi, "alpha": weights.alpha, "bias": weights.bias}


def errors(got: Arrays, wanted: Arrays) -> dict[str, float]:
    """Relative l2 error of each array."""
    out = {}
    for name, value in wanted.items():
        a, b = np.asarray(got[name], np.float64), np.asarray(value, np.float64)
        assert a.shape == b.shape, name
        out[name] = float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-300))
    return out
