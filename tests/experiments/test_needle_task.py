"""The generator of needles: answers follow from the haystack and from nothing else, and needles lie everywhere alike."""

import numpy as np
import pytest

from mhc_jax.experiments.needle_task import Task, make_sequences

TASK = Task(length=96, needles=6, keys=8, values=5, filler=4)


def make(count=200, seed=0):
    return make_sequences(TASK, count, np.random.default_rng(seed))


def test_a_reader_of_the_haystack_answers_every_question():
    made = make()
    first_answer = TASK.filler + TASK.keys
    for tokens, targets in zip(made.batch["tokens"], made.batch["targets"]):
        pairs = tokens[: TASK.haystack] - (first_answer + TASK.values)
        known = {int(pair) // TASK.values: int(pair) % TASK.values for pair in pairs[pairs >= 0]}
        assert len(known) == TASK.needles
        asked = np.flatnonzero(targets >= 0)
        assert list(asked) == list(range(TASK.haystack, TASK.length, 2))
        for place in asked:
            assert targets[place] == first_answer + known[int(tokens[place]) - TASK.filler]
            assert tokens[place + 1] == targets[place]


def test_where_the_needles_are_said_to_be_they_are():
    made = make()
    rows = np.arange(len(made.needle))[:, None]
    needles = made.batch["tokens"][rows, made.needle] - (TASK.filler + TASK.keys + TASK.values)
    assert (needles // TASK.values == made.batch["tokens"][:, made.question] - TASK.filler).all()
    assert (needles % TASK.values == made.answers - TASK.filler - TASK.keys).all()


def test_values_are_independent_of_keys():
    made = make(count=3000)
    keys, values = made.batch["tokens"][:, made.question] - TASK.filler, made.answers - TASK.filler - TASK.keys
    table = np.zeros((TASK.keys, TASK.values))
    np.add.at(table, (keys.ravel(), values.ravel()), 1)
    expected = table.sum() / table.size
    assert (((table - expected) ** 2) / expected).sum() < 39 + 6 * (2 * 39) ** 0.5  # chi squared, six deviations


def test_every_depth_is_as_likely_for_every_question():
    needle = make(count=4000).needle
    for of_question in needle.T:
        counts = np.histogram(of_question, bins=4, range=(0, TASK.haystack))[0]
        assert np.abs(counts - 1000).max() < 6 * (1000 * 0.75) ** 0.5


def test_the_seed_decides_everything():
    a, b, c = make(seed=1), make(seed=1), make(seed=2)
    assert all((a.batch[name] == b.batch[name]).all() for name in a.batch)
    assert (a.batch["tokens"] != c.batch["tokens"]).any()


def test_tokens_lie_in_the_vocabulary_below_256():
    assert Task().vocab_size < 256
    tokens = make().batch["tokens"]
    assert tokens.min() == 0 and tokens.max() == TASK.vocab_size - 1


def test_needles_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="9 needles need as many different keys"):
        Task(length=96, needles=9, keys=8)
