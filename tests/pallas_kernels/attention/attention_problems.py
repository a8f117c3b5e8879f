"""Random attention problems, and what the specification makes of them in float64. Errors are relative l2."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import dense_attention, reference

NAMES = ("q_nope", "q_rope", "k_nope", "k_rope", "value")
SCALE = 0.1


@dataclass(frozen=True)
class Problem:
    """Arguments of dense attention in their order, and a cotangent of what it returns."""

    args: tuple[jax.Array, ...]
    first: jax.Array
    d_out: jax.Array


def first_of(length: int, batch: int, documents: int, seed: int = 0) -> np.ndarray:
    """Where every token's document begins: as many documents a sequence, cut at random."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(batch):
        cuts = np.concatenate([[0], np.sort(rng.choice(np.arange(1, length), documents - 1, replace=False))]).astype(np.int32)
        rows.append(cuts[np.searchsorted(cuts, np.arange(length), side="right") - 1])
    return np.stack(rows)


def problem(
    length: int, *, batch=1, heads=2, width=128, rope=64, value=128, dtype: Any = jnp.float32, documents: int = 1, seed: int = 0
) -> Problem:
    """Queries and keys of unit scale: logits of about +-5 at SCALE, so that the softmax is neither flat nor one-hot."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), dtype)

    per_head = (batch, heads, length)
    args = (
        normal(*per_head, width),
        normal(*per_head, rope),
        normal(*per_head, width),
        normal(batch, length, rope),
        normal(*per_head, value),
    )
    return Problem(args, jnp.asarray(first_of(length, batch, documents, seed)), normal(*per_head, value))


def run(p: Problem, implementation: str, interpret: Any = True, **options: Any) -> dict[str, np.ndarray]:
    """What the public function returns and its gradients, by name."""
    options |= {"implementation": implementation, "interpret": interpret if implementation != "xla" else False}

    @jax.jit
    def both(args, d_out):
        found, pull = jax.vjp(lambda *a: dense_attention(*a, p.first, scale=SCALE, **options), *args)
        gradients = pull(found._replace(out=d_out))  # cotangents of the other two must not matter
        return found._asdict() | dict(zip(NAMES, gradients))

    return jax.tree.map(np.asarray, both(p.args, p.d_out))


def oracle(p: Problem) -> dict[str, np.ndarray]:
    """The same of the specification in float64, differentiated by JAX."""
    with jax.enable_x64(True):
        args = tuple(jnp.asarray(a, jnp.float64) for a in p.args)

        @jax.jit
        def both(args, d_out):
            out, pull, rest = jax.vjp(lambda *a: _split(reference.dense_attention(*a, p.first, SCALE)), *args, has_aux=True)
            return {"out": out, "log_total": rest[0], "top": rest[1]} | dict(zip(NAMES, pull(d_out)))

        return jax.tree.map(np.asarray, both(args, jnp.asarray(p.d_out, jnp.float64)))


def _split(attended):
    return attended.out, (attended.log_total, attended.top)


def errors(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> dict[str, float]:
    """Relative l2 error of each array."""
    found = {}
    for name, value in wanted.items():
        a, b = np.asarray(got[name], np.float64), np.asarray(value, np.float64)
        assert a.shape == b.shape, name
        found[name] = float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-300))
    return found
