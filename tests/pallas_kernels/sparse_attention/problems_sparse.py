"""Random sparse attention problems, and what the specification makes of them in float64. Errors are relative l2."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.sparse_attention import reference, sparse_mla
from pallas_kernels.visible import PAGE, Selected, Span, causal_span

Arrays = dict[str, np.ndarray]
NAMES = ("q_nope", "q_rope", "key_up", "value_up", "latent")


@dataclass(frozen=True)
class Problem:
    """Arguments of sparse_mla and a cotangent for its output."""

    arrays: dict[str, jax.Array]
    selected: Selected
    span: Span
    pages: bool
    d_out: jax.Array
    scale: float = 0.3


def problem(
    *,
    length: int = 24,
    keys: int | None = None,
    chosen: int = 6,
    pages: bool = False,
    batch: int = 2,
    heads: int = 3,
    nope: int = 8,
    rope: int = 4,
    value: int = 6,
    rank: int = 16,
    dtype: Any = jnp.float32,
    documents: int = 2,
    empty: bool = True,
    seed: int = 0,
) -> Problem:
    """Causal over packed documents, queries at the end of the keys; keys (or pages) drawn from the visible ones, some queries have none."""
    rng = np.random.default_rng(seed)
    keys = keys or length
    arrays = {
        "q_nope": rng.standard_normal((batch, length, heads, nope)),
        "q_rope": rng.standard_normal((batch, length, heads, rope)),
        "key_up": rng.standard_normal((rank, heads, nope)) * rank**-0.5,
        "value_up": rng.standard_normal((rank, heads, value)) * rank**-0.5,
        "latent": rng.standard_normal((batch, keys, rank + rope)),
    }
    segments = np.sort(rng.integers(0, documents, (batch, keys)), axis=1)
    span = Span(*(x[:, keys - length :] for x in causal_span(jnp.asarray(segments, jnp.int32))))
    first, stop = (np.asarray(x) for x in span)
    blocks, unit = (-(-length // PAGE), PAGE) if pages else (length, 1)
    most = min(chosen, -(-keys // unit))
    index, count = np.zeros((batch, blocks, most), np.int32), np.zeros((batch, blocks), np.int32)
    for b in range(batch):
        for i in range(blocks):
            rows = slice(i * unit, (i + 1) * unit)
            seen = np.arange(first[b, rows].min() // unit, (stop[b, rows].max() - 1) // unit + 1)
            own = {seen[-1]} if pages else set()  # a page holds queries that see nothing else, if it is not chosen
            drawn = set(rng.choice(seen, min(most, len(seen)), replace=False)) | own
            drawn = np.sort(list(drawn))[-most:]
            count[b, i] = 0 if empty and i % 7 == 3 and not pages else len(drawn)
            index[b, i, : count[b, i]] = drawn[: count[b, i]]
    d_out = jnp.asarray(rng.standard_normal((batch, length, heads, value)), dtype)
    made = {name: jnp.asarray(x, dtype) for name, x in arrays.items()}
    return Problem(made, Selected(jnp.asarray(index), jnp.asarray(count)), span, pages, d_out)


def run(p: Problem, **options: Any) -> Arrays:
    """What sparse_mla returns, and its gradients as "d NAME"."""
    return _run(partial(sparse_mla, scale=p.scale, pages=p.pages, **options), p)


def oracle(p: Problem) -> Arrays:
    """The same of the specification, in float64."""
    with jax.enable_x64(True):
        wide = replace(
            p, arrays={n: jnp.asarray(np.asarray(x, np.float64)) for n, x in p.arrays.items()}, d_out=jnp.asarray(p.d_out, float)
        )
        return _run(partial(reference.sparse_mla, scale=p.scale, pages=p.pages), wide)


def _run(fn: Any, p: Problem) -> Arrays:
    @jax.jit
    def both(arrays: Any, selected: Selected, span: Span, d_out: jax.Array) -> Any:
        def of(arrays: Any) -> Any:
            attended = fn(*(arrays[name] for name in NAMES), selected, span)
            return attended.out, attended

        _, pull, attended = jax.vjp(of, arrays, has_aux=True)
        return attended, pull(d_out)[0]

    attended, gradients = both(p.arrays, p.selected, p.span, p.d_out)
    named = attended._asdict() | {f"d {name}": gradient for name, gradient in gradients.items()}
    return {name: np.asarray(x) for name, x in named.items()}


def errors(got: Arrays, wanted: Arrays) -> dict[str, float]:
    """Relative l2 of every array."""
    return {
        name: float(np.linalg.norm((np.asarray(got[name], np.float64) - wanted[name]).ravel()) / np.linalg.norm(wanted[name].ravel()))
        for name in wanted
    }


def check(p: Problem, tolerance: float, **options: Any) -> Arrays:
    """Asserts that every output and gradient is as the oracle has it; returns them."""
    got = run(p, **options)
    found = errors(got, oracle(p))
    assert max(found.values()) < tolerance, found
    return got
