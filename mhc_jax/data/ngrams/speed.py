"""How fast rows are computed: `mhc-jax ngrams`."""

import time
from collections.abc import Mapping

import numpy as np

from mhc_jax.data.ngrams.artifact import EngramArtifact
from mhc_jax.data.ngrams.hashing import NgramHash
from mhc_jax.engram_config import EngramConfig
from mhc_jax.engram_layout import multipliers, table_primes

SHAPE = (16, 4096)  # sequences, tokens
VOCAB, CLASSES = 129_280, 99_092  # of DeepSeek-V3's tokenizer
DOCUMENT = 500  # mean length in tokens


def speed_table(configs: Mapping[str, EngramConfig], threads: int, rounds: int) -> str:
    """A line for each config: millions of (token, layer) pairs a second, of the fastest round and of the median one.

    On a machine that others use too, the fastest round is the one that says something about the code.
    """
    lines = [
        f"{'config':12} {'orders':8} {'heads':>5} {'rows a pair':>11} {'best':>8} {'median':>8}   million pairs a second, {threads} threads"
    ]
    for name, config in configs.items():
        seconds = measure(config, threads, rounds)
        pairs = SHAPE[0] * SHAPE[1] * len(config.layers) / 1e6
        orders, rows = ",".join(map(str, config.orders)), config.heads * len(config.orders)
        lines.append(
            f"{name:12} {orders:8} {config.heads:5} {rows:11} {pairs / min(seconds):8.1f} {pairs / float(np.median(seconds)):8.1f}"
        )
    return "\n".join(lines)


def measure(config: EngramConfig, threads: int, rounds: int) -> list[float]:
    """Seconds that each round took for one batch of random tokens in documents, of the size of DeepSeek-V3's vocabulary."""
    rng = np.random.default_rng(0)
    lookup = np.append(np.arange(CLASSES), rng.integers(0, CLASSES, VOCAB - CLASSES)).astype(np.int32)
    artifact = EngramArtifact(
        config=config,
        tokenizer="none",
        pad=2,
        lookup=lookup,
        multipliers=multipliers(config, CLASSES),
        primes=table_primes(config),
    )
    tokens = rng.integers(0, VOCAB, SHAPE, np.int32)
    segment_ids = 1 + np.cumsum(rng.random(SHAPE) < 1 / DOCUMENT, axis=1, dtype=np.int32)
    ngrams, seconds = NgramHash(artifact, threads), []
    for _ in range(rounds):
        started = time.perf_counter()
        ngrams.rows(tokens, segment_ids)
        seconds.append(time.perf_counter() - started)
    return seconds
