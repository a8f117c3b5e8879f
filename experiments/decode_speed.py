"""What does a token cost after a long context? One token decoded with dense and with sparse attention, the same weights, in turn.

The caches hold random numbers: what a token costs does not depend on what they are, and filling a long cache would take far longer than
what is measured. So is the network random.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mhc_jax.config import Config, override
from mhc_jax.errors import UserError
from mhc_jax.nn.decode import Cache, decode, network_of
from mhc_jax.nn.decoder import Decoder, initial_router_bias

WARM_UP = 2  # rounds that are not counted
ROUND = 8  # tokens in a row of each kind: their mean is one measurement


@dataclass(frozen=True)
class DecodeSpeed:
    """Seconds of a token, a measurement each round."""

    kind: str  # "dense" or "sparse"
    seconds: tuple[float, ...]
    ratios: tuple[float, ...]  # dense over this one, round by round


def measure(config: Config, context: int, rounds: int) -> list[DecodeSpeed]:
    """Decodes tokens of one sequence after `context` others: dense attention, then sparse, and so on.

    Raises:
      UserError: the config has no sparse attention to compare, or reads tables, which are not what is measured here.
    """
    model = config.model
    if model.attention.sparse is None or model.attention.sparse.stage == "warmup":
        raise UserError(f"--decode compares sparse attention with dense, but {config.name} is dense; name another, such as dsa_laptop")
    if model.engram is not None:
        raise UserError(f"--decode measures attention, but {config.name} has model.engram; name a config without")
    sparse = jax.jit(lambda: Decoder(model, jax.random.key(0)))()
    of_dense = override(config, {"model.attention.sparse": None}).model
    values = dict(jax.tree_util.tree_leaves_with_path(sparse))
    shapes = jax.eval_shape(lambda: Decoder(of_dense, jax.random.key(0)))
    dense = jax.tree_util.tree_map_with_path(lambda path, _: values[path], shapes)
    capacity = context + (WARM_UP + rounds) * ROUND
    runs = [_Run(own, context, capacity) for own in (dense, sparse)]
    seconds: list[list[float]] = [[], []]
    for _ in range(WARM_UP + rounds):
        for run, own in zip(runs, seconds):
            own.append(run.seconds_of_a_token())
    dense_seconds, sparse_seconds = (tuple(own[WARM_UP:]) for own in seconds)
    ratios = tuple(d / s for d, s in zip(dense_seconds, sparse_seconds))
    return [DecodeSpeed("dense", dense_seconds, (1.0,) * rounds), DecodeSpeed("sparse", sparse_seconds, ratios)]


class _Run:
    """One network and its cache."""

    def __init__(self, model: Decoder, context: int, capacity: int):
        structure: Any
        network = network_of(model, initial_router_bias(model.config))
        self._arrays, structure = jax.tree.flatten(network)

        def step(arrays: list[Any], token: Any, cache: Cache) -> tuple[Any, Cache]:
            logits, cache = decode(structure.unflatten(arrays), token[:, None], jnp.ones(1, jnp.int32), cache)
            return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

        def filled(key: Any) -> Cache:
            empty = Cache.empty(model.config, 1, capacity)
            latents = jax.tree.map(lambda x: jax.random.normal(key, x.shape, x.dtype), empty.latents)
            return empty._replace(length=jnp.full(1, context, jnp.int32), latents=latents)

        self._step = jax.jit(step, donate_argnames="cache")
        self._cache, self._token = jax.jit(filled)(jax.random.key(1)), jnp.zeros(1, jnp.int32)

    def seconds_of_a_token(self) -> float:
        """The mean over ROUND tokens, each of which is chosen before the next begins."""
        begun = time.perf_counter()
        for _ in range(ROUND):
            self._token, self._cache = self._step(self._arrays, self._token, self._cache)
        jax.block_until_ready(self._token)
        return (time.perf_counter() - begun) / ROUND


def table(speeds: Sequence[DecodeSpeed], context: int) -> str:
    """A Markdown table: medians over the rounds, the fastest round, and the range of the ratios."""
    rows = [f"| attention | a token after {context:,}, ms | fastest | tokens/s | speed over dense (range) |", "|---|---|---|---|---|"]
    for own in speeds:
        seconds = statistics.median(own.seconds)
        ratio = f"{statistics.median(own.ratios):.2f} ({min(own.ratios):.2f} to {max(own.ratios):.2f})"
        rows.append(f"| {own.kind} | {seconds * 1e3:.2f} | {min(own.seconds) * 1e3:.2f} | {1 / seconds:,.0f} | {ratio} |")
    return "\n".join(rows)
