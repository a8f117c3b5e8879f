"""Which token comes next: drawn from the logits on the device, each sequence with random numbers of its own."""

import math
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from mhc_jax.errors import UserError

GREEDY_BELOW = 1e-5  # temperature at which the division of logits would leave float32


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. The cuts are made in this order: temperature, top_k, top_p.

    Raises:
      UserError: a value is out of range.
    """

    temperature: float = 0.8  # of the softmax; 0: always the most likely token
    top_k: int = 0  # only the so many most likely tokens; 0: all
    top_p: float = 1.0  # only the most likely tokens that together have this probability (nucleus sampling, arXiv 1904.09751)

    def __post_init__(self):
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise UserError(f"temperature is {self.temperature}; it must be zero or a positive finite number")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; it must be a number of tokens, or 0 for all")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must lie above 0 and be at most 1")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature < GREEDY_BELOW


def sample(logits: Float[Array, "B V"], keys: PRNGKeyArray, positions: Int[Array, "B"], sampling: Sampling) -> Int[Array, "B"]:
    """The next token of each sequence; the random numbers depend on its own key and position alone. Equal logits are cut together."""
    if sampling.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = (logits - logits.max(axis=-1, keepdims=True)) / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p < 1:
        falling = -jnp.sort(-logits, axis=-1)
        probability = jax.nn.softmax(falling, axis=-1)
        kept = jnp.cumsum(probability, axis=-1) - probability < sampling.top_p  # what comes before it has less than top_p
        least = jnp.where(kept, falling, jnp.inf).min(axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.vmap(jax.random.categorical)(jax.vmap(jax.random.fold_in)(keys, positions), logits).astype(jnp.int32)


def keys_of(prompts: Sequence[str], seed: int) -> PRNGKeyArray:
    """A key for each prompt, which depends on the prompt and on how often it came before, not on the others: [B]."""
    base, seen = jax.random.key(seed), Counter[str]()
    numbers = []
    for prompt in prompts:
        numbers.append((zlib.crc32(prompt.encode("utf-8", "surrogatepass")), seen[prompt]))
        seen[prompt] += 1
    prompt_numbers, times = (jnp.asarray(column, jnp.uint32) for column in zip(*numbers))
    return jax.vmap(lambda prompt, time: jax.random.fold_in(jax.random.fold_in(base, prompt), time))(prompt_numbers, times)
