"""What reaches training: every token once an epoch, in the right order, resumable bit for bit."""

import itertools
import json

import numpy as np
import pytest
from grain.sources import ArrayRecordDataSource

from mhc_jax.data.batch import IGNORED, Batch
from mhc_jax.data.pipeline import heldout_batches, training_batches
from mhc_jax.data.prepared import Prepared, PreparedSource
from mhc_jax.errors import UserError

SEQ_LEN, BATCH = 32, 4

Document = tuple[int, ...]


def records(split: str, *sources: PreparedSource) -> list[Document]:
    """The documents of the training or held-out split, "train" or "heldout"."""
    found = []
    for prepared in sources:
        source = ArrayRecordDataSource(str(prepared.folder / f"{split}.array_record"))
        found += [tuple(np.frombuffer(source[i], prepared.token_dtype).tolist()) for i in range(len(source))]
    return found


def unpack(batches: list[Batch], prepared: Prepared) -> list[Document]:
    """The documents in their order, from the (token, target) pairs of the rows in theirs; a last part without its end is left out."""
    tokens, targets = (np.concatenate([batch[name].ravel() for batch in batches]) for name in ("tokens", "targets"))
    tokens, targets = tokens[targets != IGNORED], targets[targets != IGNORED]
    ends = np.flatnonzero(targets == prepared.end_of_text) + 1
    return [(*tokens[a:b].tolist(), prepared.end_of_text) for a, b in itertools.pairwise([0, *ends.tolist()])]


def take(iterator, count: int) -> list[Batch]:
    return list(itertools.islice(iterator, count))


def same(ours: list[Batch], theirs: list[Batch]) -> bool:
    return len(ours) == len(theirs) and all(np.array_equal(a[name], b[name]) for a, b in zip(ours, theirs) for name in a)


@pytest.mark.parametrize("seq_len", [1, 7, SEQ_LEN, 500])
def test_an_epoch_holds_every_training_document_once(prepared: Prepared, seq_len: int):
    batches = list(training_batches(prepared, seq_len=seq_len, batch_size=BATCH, seed=0, repeat=False))
    assert sorted(unpack(batches, prepared)) == sorted(records("train", *prepared.sources))
    assert sum(int((batch["targets"] != IGNORED).sum()) for batch in batches) == prepared.train_pairs


def test_heldout_text_is_never_trained_on(prepared: Prepared):
    heldout = set(records("heldout", *prepared.sources))
    batches = take(training_batches(prepared, seq_len=SEQ_LEN, batch_size=BATCH, seed=0), 200)
    assert heldout
    assert heldout.isdisjoint(unpack(batches, prepared))


def test_batches_are_int32_of_fixed_shape(prepared: Prepared):
    for batch in training_batches(prepared, seq_len=SEQ_LEN, batch_size=BATCH, seed=0, repeat=False):
        assert set(batch) == {"tokens", "targets", "segment_ids", "positions"}
        assert all(x.shape == (BATCH, SEQ_LEN) and x.dtype == np.int32 for x in batch.values())
        assert batch["tokens"].min() >= 0
        assert batch["tokens"].max() < prepared.vocab_size


def test_rows_are_numbered_by_document(prepared: Prepared):
    for batch in take(training_batches(prepared, seq_len=SEQ_LEN, batch_size=BATCH, seed=0), 50):
        for row in range(BATCH):
            tokens, targets, segments, positions = (batch[name][row] for name in ("tokens", "targets", "segment_ids", "positions"))
            ends = targets[:-1] == prepared.end_of_text
            np.testing.assert_array_equal(np.diff(segments), ends.astype(np.int32))
            np.testing.assert_array_equal(targets[:-1][~ends], tokens[1:][~ends])
            assert segments[0] == 1
            assert positions[0] == 0
            np.testing.assert_array_equal(positions[1:], np.where(ends, 0, positions[:-1] + 1))


def test_a_row_ends_with_its_true_target(prepared: Prepared):
    rows = take(training_batches(prepared, seq_len=SEQ_LEN, batch_size=1, seed=0), 100)
    for row, following in itertools.pairwise(rows):
        assert row["targets"][0, -1] in (prepared.end_of_text, following["tokens"][0, 0])


def test_end_of_text_is_a_target_and_never_an_input(prepared: Prepared):
    batches = list(training_batches(prepared, seq_len=SEQ_LEN, batch_size=BATCH, seed=0, repeat=False))
    inputs = np.concatenate([batch["tokens"][batch["segment_ids"] > 0] for batch in batches])
    assert prepared.end_of_text not in inputs
    assert sum(int((batch["targets"] == prepared.end_of_text).sum()) for batch in batches) == prepared.train_documents


def test_padding_is_only_at_the_end_and_is_ignored(prepared: Prepared):
    batches = list(training_batches(prepared, seq_len=SEQ_LEN, batch_size=BATCH, seed=0, repeat=False))
    padding = np.concatenate([batch["segment_ids"].ravel() for batch in batches]) == 0
    assert np.flatnonzero(padding)[0] == prepared.train_pairs
    for batch in batches:
        np.testing.assert_array_equal(batch["targets"] == IGNORED, batch["segment_ids"] == 0)


def test_each_epoch_has_a_new_order(prepared: Prepared):
    count = 2 * prepared.train_pairs // SEQ_LEN + 1
    documents = unpack(take(training_batches(prepared, seq_len=SEQ_LEN, batch_size=1, seed=0), count), prepared)
    first, second = documents[: prepared.train_documents], documents[prepared.train_documents : 2 * prepared.train_documents]
    assert sorted(first) == sorted(second)
    assert first != second


def test_the_seed_alone_decides_the_order(prepared: Prepared):
    def batches(seed: int, **options) -> list[Batch]:
        return take(training_batches(prepared, seq_len=SEQ_LEN, batch_size=BATCH, seed=seed, **options), 100)

    assert same(batches(3), batches(3))
    assert same(batches(3), batches(3, read_threads=1))
    assert not same(batches(3)[:1], batches(4)[:1])


def test_rows_that_are_kept_are_those_of_the_whole_batch_and_one_position_serves_all(prepared: Prepared):
    def fresh(keep: list[int] | None):
        return training_batches(prepared, seq_len=SEQ_LEN, batch_size=BATCH, seed=0, keep=None if keep is None else np.array(keep))

    whole, part, other = fresh(None), fresh([1, 2]), fresh([0, 3])
    for batch in take(whole, 10):
        for rows, own in (([1, 2], next(part)), ([0, 3], next(other))):
            assert same([own], [{name: x[rows] for name, x in batch.items()}])
    assert json.dumps(whole.get_state()) == json.dumps(part.get_state()) == json.dumps(other.get_state())
    following = take(whole, 3)
    other.set_state(part.get_state())
    assert same(take(other, 3), [{name: x[[0, 3]] for name, x in batch.items()} for batch in following])

    options = {"seq_len": SEQ_LEN, "sequences": 4, "batch_size": 2}
    for batch, own in zip(heldout_batches(prepared, **options), heldout_batches(prepared, keep=np.array([1]), **options), strict=True):
        assert same([own], [{name: x[1:] for name, x in batch.items()}])


@pytest.mark.parametrize("seq_len", [1, SEQ_LEN, 500])
def test_resume_goes_on_bit_for_bit(prepared: Prepared, seq_len: int):
    def fresh():
        return training_batches(prepared, seq_len=seq_len, batch_size=BATCH, seed=0)

    epoch = prepared.train_pairs // (BATCH * seq_len)
    original = fresh()
    states = []
    batches = []
    for _ in range(min(2 * epoch, 60) + 4):
        states.append(json.dumps(original.get_state()))
        batches.append(next(original))
    for index, state in enumerate(states[:-3]):
        resumed = fresh()
        resumed.set_state(json.loads(state))
        assert json.dumps(resumed.get_state()) == state
        assert same(take(resumed, 3), batches[index : index + 3])


def test_an_iterator_can_be_set_back(prepared: Prepared):
    iterator = training_batches(prepared, seq_len=SEQ_LEN, batch_size=BATCH, seed=0)
    take(iterator, 5)
    state = iterator.get_state()
    ahead = take(iterator, 20)
    iterator.set_state(state)
    assert same(take(iterator, 20), ahead)


def test_worker_processes_change_nothing_and_resume(prepared: Prepared):
    def fresh(workers: int):
        return training_batches(prepared, seq_len=SEQ_LEN, batch_size=BATCH, seed=0, workers=workers)

    expected = take(fresh(0), 60)
    iterator = fresh(2)
    assert same(take(iterator, 30), expected[:30])
    state = json.dumps(iterator.get_state())
    assert same(take(iterator, 30), expected[30:])
    iterator.close()
    resumed = fresh(2)
    resumed.set_state(json.loads(state))
    assert same(take(resumed, 30), expected[30:])
    resumed.close()


def test_heldout_rows_are_full_fixed_and_spread(prepared: Prepared):
    available = prepared.heldout_pairs // SEQ_LEN
    (everything,) = heldout_batches(prepared, seq_len=SEQ_LEN, sequences=available, batch_size=available)
    packed = unpack([everything], prepared)
    assert packed == records("heldout", *prepared.sources)[: len(packed)]
    assert IGNORED not in everything["targets"]

    batches = heldout_batches(prepared, seq_len=SEQ_LEN, sequences=6, batch_size=2)
    assert [batch["tokens"].shape for batch in batches] == [(2, SEQ_LEN)] * 3
    chosen = [i * available // 6 for i in range(6)]
    for name, rows in everything.items():
        np.testing.assert_array_equal(np.concatenate([batch[name] for batch in batches]), rows[chosen])


def test_heldout_text_too_short(prepared: Prepared):
    available = prepared.heldout_pairs // SEQ_LEN
    with pytest.raises(
        UserError, match=rf"has {available} sequences of {SEQ_LEN} tokens, but train\.eval_sequences asks for {available + 1}"
    ):
        heldout_batches(prepared, seq_len=SEQ_LEN, sequences=available + 1, batch_size=1)


def test_heldout_batches_of_unequal_size(prepared: Prepared):
    with pytest.raises(UserError, match="5 held-out sequences cannot be cut into batches of 2"):
        heldout_batches(prepared, seq_len=SEQ_LEN, sequences=5, batch_size=2)


def test_row_longer_than_the_corpus(prepared: Prepared):
    with pytest.raises(UserError, match=rf"has only {prepared.train_pairs} tokens to predict"):
        training_batches(prepared, seq_len=prepared.train_pairs + 1, batch_size=1, seed=0)
