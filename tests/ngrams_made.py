"""Artifacts made for tests without a tokenizer."""

import numpy as np

from mhc_jax.data.ngrams.artifact import EngramArtifact
from mhc_jax.engram_config import EngramConfig
from mhc_jax.engram_layout import multipliers, table_primes

SMALL = EngramConfig(layers=(0, 1), table_sizes=(101, 101), heads=2)


def made(config: EngramConfig, classes: int, pad: int = 2, lookup: np.ndarray | None = None) -> EngramArtifact:
    """With `lookup` None, every token is its own class."""
    return EngramArtifact(
        config=config,
        tokenizer="none",
        pad=pad,
        lookup=np.arange(classes, dtype=np.int32) if lookup is None else lookup,
        multipliers=multipliers(config, classes),
        primes=table_primes(config),
    )
