"""Random gates, and what the specification makes of them in float64. Errors are relative l2."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.engram_gate import ShortConv, gate_add, gate_conv_add, reference

NORM_EPS, CONV_EPS = 1e-6, 1e-5
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Gate:
    """Arguments of a gate, and cotangents for what it returns."""

    streams: jax.Array
    keys_value: jax.Array
    gain: jax.Array
    conv: ShortConv | None
    cotangents: tuple[jax.Array, jax.Array]


def document_of(tokens: int) -> np.ndarray:
    """Documents of 1, 2, 3 ... tokens one after the other: every reach up to many tokens occurs."""
    return np.repeat(np.arange(tokens), np.arange(tokens) + 1)[:tokens]


def reach_of(document: np.ndarray) -> np.ndarray:
    """How many earlier tokens of its document every token has."""
    first = np.searchsorted(document, document)
    return (np.arange(len(document)) - first).astype(np.int32)


def gate(n: int, tokens: int, width: int, dtype: Any = jnp.float32, conv: bool = False, seed: int = 0, one_document: bool = False) -> Gate:
    """Streams of unit scale and keys that agree with them more or less, values of scale 2, gains about 1."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int, std: float = 1.0, mean: float = 0.0, kind: Any = jnp.float32) -> jax.Array:
        return jnp.asarray(mean + std * rng.standard_normal(shape), kind)

    h = normal(tokens, n * width, kind=dtype)
    agreement = rng.uniform(0.4, 1, (tokens, 1)) * rng.choice([-1, 1], (tokens, 1))  # no score near zero, where its root is steep
    keys = agreement * np.asarray(h, np.float32) + 0.7 * rng.standard_normal(h.shape)
    value = 2 * rng.standard_normal((tokens, width))
    keys_value = jnp.asarray(np.concatenate([keys, value], axis=1), dtype)
    document = np.zeros(tokens, int) if one_document else document_of(tokens)
    short = ShortConv(normal(4, n, width, std=0.7), normal(n, width, mean=1.0, std=0.3), jnp.asarray(reach_of(document))) if conv else None
    cotangents = (normal(*h.shape, kind=dtype), normal(n, tokens, std=width**0.5))
    return Gate(h, keys_value, normal(n, width, mean=1.0, std=0.3), short, cotangents)


def _named(out: Any, gradients: Any) -> tuple[Arrays, Arrays]:
    streams, keys_value, gain, *conv = gradients
    named = {"streams": streams, "keys_value": keys_value, "gain": gain}
    if conv:
        named |= {"conv weight": conv[0].weight, "conv gain": conv[0].gain}
    return dict(zip(("out", "alpha"), out)), named


def run(g: Gate, implementation: str, interpret: Any = True) -> tuple[Arrays, Arrays]:
    """Outputs and gradients by name, of the public functions."""
    options = {"implementation": implementation, "interpret": interpret if implementation != "xla" else False}

    def f(*args):
        if len(args) == 4:
            return gate_conv_add(*args, norm_eps=NORM_EPS, conv_eps=CONV_EPS, **options)
        return gate_add(*args, norm_eps=NORM_EPS, **options)

    @jax.jit
    def both(*args):
        out, pull = jax.vjp(f, *args)
        return _named(out, pull(g.cotangents))

    return both(*(a for a in (g.streams, g.keys_value, g.gain, g.conv) if a is not None))


def oracle(g: Gate) -> tuple[Arrays, Arrays]:
    """The same of the specification in float64, differentiated by JAX."""
    with jax.enable_x64(True):
        args = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64) if a.dtype != jnp.int32 else a, (g.streams, g.keys_value, g.gain, g.conv))
        cotangents = tuple(jnp.asarray(a, jnp.float64) for a in g.cotangents)
        if g.conv is None:
            out, pull = jax.vjp(lambda *a: reference.gate_add(*a, NORM_EPS), *args[:3])
        else:
            out, pull = jax.vjp(lambda *a: reference.gate_conv_add(*a, NORM_EPS, CONV_EPS), *args)
        return jax.tree.map(np.asarray, _named(out, pull(cotangents)))


def errors(got: Arrays, wanted: Arrays) -> dict[str, float]:
    """Relative l2 error of each array."""
    found = {}
    for name, value in wanted.items():
        a, b = np.asarray(got[name], np.float64), np.asarray(value, np.float64)
        assert a.shape == b.shape, name
        found[name] = float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-300))
    return found


def check(g: Gate, implementation: str, interpret: Any = True) -> None:
    """Outputs and gradients against float64.

    float32: sums of C products; scores are an order of magnitude from zero, where the slope of their root would multiply errors.
    bfloat16: what has the streams' type is rounded once, when it is written, to 1.7e-3 in this norm; the rest is as for float32.
    Gradients of gains are sums over tokens, too.
    """
    exact = 5e-6 * max(1.0, len(g.streams) / 1000) ** 0.5
    rounded = {"out", "streams", "keys_value"} if g.streams.dtype == jnp.bfloat16 else set()
    for got, wanted in zip(run(g, implementation, interpret), oracle(g)):
        for name, error in errors(got, wanted).items():
            assert error < (2e-3 if name in rounded else exact), f"{name}: {error:.2e}"
