"""Small models and batches that tests of several rooms share."""

from collections.abc import Iterable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhc_jax.config import AttentionConfig, Config, DataConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig, override
from mhc_jax.nn.decoder import Decoder
from mhc_jax.nn.module import Module

KINDS = ("residual", "hc", "static_hc", "mhc", "identity_hc", "mhc_lite", "kromhc")
MANY = KINDS[1:]  # the kinds with several streams
FORMS = tuple(kind for kind in KINDS if kind != "mhc_lite")  # for tests that take long: it is kromhc's code but for how H_res is made

BASE = Config(
    name="small",
    model=ModelConfig(
        residual="mhc",
        vocab_size=48,
        num_layers=3,
        dim=16,
        dense_layers=1,
        dense_dim=24,
        attention=AttentionConfig(num_heads=2, nope_dim=8, rope_dim=4, value_dim=6, kv_rank=12, query_block=8),
        moe=MoEConfig(num_experts=4, top_k=2, shared_experts=1, expert_dim=12),
        init_std=0.1,
        dtype="float32",
        remat="none",
        loss_chunk=8,
    ),
    optimizer=OptimizerConfig(learning_rate=1e-3),
    data=DataConfig(seq_len=16),
    train=TrainConfig(steps=10, batch_size=8),
)


def small(**changes: Any) -> ModelConfig:
    """The small model with the given fields changed; `__` stands for a dot: small(moe__top_k=1)."""
    return override(BASE, {f"model.{path.replace('__', '.')}": value for path, value in changes.items()}).model


@cache
def make(config: ModelConfig, seed: int = 0, impl: str = "rbg") -> Decoder:
    """A model, constructed in one compiled call; the default random numbers are those that compile fastest."""
    return jax.jit(lambda: Decoder(config, jax.random.key(seed, impl=impl)))()


def only(chosen: Iterable[Any], everything: Iterable[Any]) -> list[Any]:
    """Parameters of a test: the chosen ones in the fast suite, the others marked slow."""
    chosen = list(chosen)
    return [value if value in chosen else pytest.param(value, marks=pytest.mark.slow) for value in everything]


def slowly(chosen: Iterable[Any], everything: Iterable[Any]) -> list[Any]:
    """Parameters of a test: the chosen ones in the slow suite, the others in the matrix."""
    chosen = list(chosen)
    return [pytest.param(value, marks=pytest.mark.slow if value in chosen else pytest.mark.matrix) for value in everything]


def make_batch(config: ModelConfig, sequences: int = 2, length: int = 16, seed: int = 0, documents: bool = True) -> dict[str, jax.Array]:
    """Random tokens; with `documents`, two documents a sequence, whose last targets are none."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, config.vocab_size, (sequences, length + 1))
    targets, positions, segments = tokens[:, 1:].copy(), np.tile(np.arange(length), (sequences, 1)), np.ones((sequences, length), int)
    if documents:
        for row in range(sequences):
            cut = int(rng.integers(length // 4, 3 * length // 4))
            targets[row, cut - 1] = -1
            positions[row, cut:] -= cut
            segments[row, cut:] = 2
    arrays = {"tokens": tokens[:, :-1], "targets": targets, "positions": positions, "segment_ids": segments}
    return {name: jnp.asarray(a, jnp.int32) for name, a in arrays.items()}


def shaken(module: Any, seed: int = 0, scale: float = 1.0) -> Any:
    """The module with random values added to its connections' parameters: coefficients depend on the token, streams differ."""
    rng = np.random.default_rng(seed)

    def shake(path, p):
        names = [key.name for key in path]
        if len(names) > 1 and not any("connection" in n or n == "head" for n in names[:-1]):
            return p
        std = {"phi": 2 * p.shape[-1] ** -0.5, "theta": 2 * p.shape[-1] ** -0.5, "bias": 0.3, "alpha": 0.3, "weights": 0.3}
        return p + jnp.asarray(scale * std[names[-1]] * rng.standard_normal(p.shape), p.dtype) if names[-1] in std else p

    return jax.tree_util.tree_map_with_path(shake, module)


def widened(module: Module) -> Any:
    """The module in float64; use it under the fixture `float64`."""
    return jax.tree.map(lambda p: jnp.asarray(np.asarray(p), jnp.float64), module)


def relative(a: Any, b: Any) -> float:
    """Largest absolute difference over the largest absolute value of b."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-300))


def tree_relative(a: Any, b: Any) -> float:
    """The largest of `relative` over the leaves of two trees."""
    return max(jax.tree.leaves(jax.tree.map(relative, a, b)))


def directional(f: Any, x: np.ndarray, direction: np.ndarray, step: float = 1e-5) -> float:
    """Derivative of a float64 function along a direction by central differences of fourth order; its error is near 1e-10 for step 1e-3."""
    h = step
    return float((8 * (f(x + h * direction) - f(x - h * direction)) - (f(x + 2 * h * direction) - f(x - 2 * h * direction))) / (12 * h))


def temporary_bytes(compiled: Any) -> int:
    """Memory that a compiled function needs beside its arguments and results."""
    return compiled.memory_analysis().temp_size_in_bytes
