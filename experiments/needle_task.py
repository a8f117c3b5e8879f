"""Needles in a haystack, made from a seed: a few key-value pairs among filler, and a question for each of them at the end.

    filler filler NEEDLE(k, v) filler ... NEEDLE(k', v') filler ... | QUESTION(k') ANSWER(v') QUESTION(k) ANSWER(v)

A needle is one token that stands for a key and a value. Keys of a sequence differ; values are independent of keys and of each other, so
nothing but the needle tells an answer, and whoever does not attend to it guesses. Only answers are targets.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class Task:
    """Sizes of the task. Token ids: filler, then questions, then answers, then needles by key and value.

    Raises:
      ValueError: there are fewer keys than needles, or the haystack is too short for the needles.
    """

    length: int = 512  # tokens of a sequence
    needles: int = 16  # of a sequence, each asked for once
    keys: int = 16
    values: int = 8
    filler: int = 16  # different filler tokens

    def __post_init__(self):
        if self.needles > self.keys or self.needles > self.haystack:
            raise ValueError(
                f"{self.needles} needles need as many different keys and a place each; there are {self.keys} and {self.haystack}"
            )

    @property
    def vocab_size(self) -> int:
        return self.filler + self.keys + self.values + self.keys * self.values

    @property
    def haystack(self) -> int:
        """Tokens before the questions."""
        return self.length - 2 * self.needles


class Sequences(NamedTuple):
    """A batch as the training step takes it, and where the needles lie."""

    batch: dict[str, np.ndarray]  # tokens, targets, positions, segment_ids: int32 [B, S]; a target of -1 is none
    needle: np.ndarray  # [B, needles]: position of the needle that each question asks for
    question: np.ndarray  # [needles]: position of each question; the next token is its answer

    @property
    def answers(self) -> np.ndarray:
        """[B, needles]: the right tokens."""
        return self.batch["targets"][:, self.question]


def make_sequences(task: Task, count: int, rng: np.random.Generator) -> Sequences:
    """`count` sequences, drawn independently: every place of the haystack is equally likely to hold a needle, and the one asked for.

    Args:
      task: sizes.
      count: B.
      rng: the only source of chance.
    """

    def shuffled(size: int) -> np.ndarray:
        """[B, needles]: different numbers below `size`."""
        return np.argsort(rng.random((count, size)), axis=1)[:, : task.needles]

    rows = np.arange(count)[:, None]
    needle, key, value = shuffled(task.haystack), shuffled(task.keys), rng.integers(task.values, size=(count, task.needles))
    question = task.haystack + 2 * np.arange(task.needles)
    first_answer = task.filler + task.keys
    tokens = rng.integers(task.filler, size=(count, task.length))
    tokens[rows, needle] = first_answer + task.values + key * task.values + value
    tokens[:, question], tokens[:, question + 1] = task.filler + key, first_answer + value
    targets = np.full((count, task.length), -1)
    targets[:, question] = first_answer + value
    positions = np.broadcast_to(np.arange(task.length)[None], tokens.shape)
    arrays = {"tokens": tokens, "targets": targets, "positions": positions, "segment_ids": np.ones_like(tokens)}
    return Sequences({name: array.astype(np.int32) for name, array in arrays.items()}, needle, question)
