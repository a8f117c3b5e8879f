"""Rows of Engram's tables in batches of the pipeline."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from ngrams_made import SMALL

from mhc_jax.data.ngrams.artifact import build_artifact
from mhc_jax.data.ngrams.hashing import NgramHash
from mhc_jax.data.pipeline import heldout_batches, training_batches
from mhc_jax.data.prepared import Prepared
from mhc_jax.data.tokenizer import load_tokenizer
from mhc_jax.errors import UserError

SEQ_LEN, BATCH = 32, 4


@pytest.fixture(scope="module")
def ngrams(prepared: Prepared) -> NgramHash:
    return NgramHash(build_artifact(SMALL, load_tokenizer(prepared.sources[0].tokenizer, prepared.vocab_size)))


def batches(prepared: Prepared, ngrams: NgramHash | None, **options):
    return training_batches(prepared, seq_len=SEQ_LEN, batch_size=BATCH, seed=0, ngrams=ngrams, **options)


def test_batches_gain_their_rows_and_nothing_else_changes(prepared: Prepared, ngrams: NgramHash):
    for plain, batch in zip(batches(prepared, None, repeat=False), batches(prepared, ngrams, repeat=False)):
        rows = batch.pop("engram_rows")
        assert rows.shape == (BATCH, SEQ_LEN, 2, 4)
        assert rows.dtype == np.int32
        np.testing.assert_array_equal(rows, ngrams.rows(batch["tokens"], batch["segment_ids"]))
        ends = ngrams.artifact.offsets + ngrams.artifact.primes.reshape(2, 4)
        assert ((ngrams.artifact.offsets <= rows) & (rows < ends)).all()
        assert batch.keys() == plain.keys()
        assert all(np.array_equal(batch[name], plain[name]) for name in plain)


def test_heldout_batches_gain_their_rows(prepared: Prepared, ngrams: NgramHash):
    options = {"seq_len": SEQ_LEN, "sequences": 4, "batch_size": 2}
    for plain, batch in zip(heldout_batches(prepared, **options), heldout_batches(prepared, ngrams=ngrams, **options), strict=True):
        np.testing.assert_array_equal(batch["engram_rows"], ngrams.rows(plain["tokens"], plain["segment_ids"]))
        assert "engram_rows" not in plain


@pytest.mark.parametrize("workers", [0, 1])
def test_rows_resume_bit_for_bit(prepared: Prepared, ngrams: NgramHash, workers: int):
    original = batches(prepared, ngrams, workers=workers)
    for _ in range(5):
        next(original)
    state = json.dumps(original.get_state())
    following = list(itertools.islice(original, 5))
    original.close()
    resumed = batches(prepared, ngrams, workers=workers)
    resumed.set_state(json.loads(state))
    for ours, theirs in zip(itertools.islice(resumed, 5), following):
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    resumed.close()


def test_a_position_saved_with_other_tables_is_refused(prepared: Prepared, ngrams: NgramHash):
    other = NgramHash(dataclasses.replace(ngrams.artifact, multipliers=ngrams.artifact.multipliers + 2))
    state = batches(prepared, ngrams).get_state()
    for changed in (batches(prepared, other), batches(prepared, None)):
        with pytest.raises(UserError, match=rf"n-gram tables {ngrams.artifact.checksum}, now"):
            changed.set_state(state)
    with pytest.raises(UserError, match="n-gram tables not recorded, now"):
        batches(prepared, ngrams).set_state(batches(prepared, None).get_state())
