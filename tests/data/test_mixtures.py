"""Several sources: shares of tokens, positions, held-out rows, and what is reported."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from small_corpus import VOCAB, data_config, texts
from test_pipeline import records, same, take, unpack

from mhc_jax.config import DataConfig
from mhc_jax.data.batch import IGNORED, Batch
from mhc_jax.data.pipeline import apportion, heldout_batches, training_batches
from mhc_jax.data.prepare import prepare
from mhc_jax.data.prepared import Prepared, unigram_entropy
from mhc_jax.errors import UserError

SEQ_LEN, BATCH = 16, 4
WEIGHTS = (0.7, 2.1, 0.2)  # of sources of 120, 40 and 24 documents
SHARES = tuple(weight / 3 for weight in WEIGHTS)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("sources")
    paths = []
    words = (["stream", "row", "mix"], ["FOUR", "SUM", "GATE"], ["2", "31", "456"])
    for i, count in enumerate((120, 40, 24)):
        paths.append(folder / f"{i}.jsonl")
        paths[-1].write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(count, seed=i, words=words[i])))
    return data_config(folder, source=tuple(map(str, paths)))


@pytest.fixture(scope="module")
def plain(config: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(config, VOCAB, cache=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def weighted(plain: Prepared) -> Prepared:
    return dataclasses.replace(plain, weights=WEIGHTS)


@pytest.fixture(params=["plain", "weighted"])
def prepared(request: pytest.FixtureRequest, plain: Prepared, weighted: Prepared) -> Prepared:
    return {"plain": plain, "weighted": weighted}[request.param]


def documents(prepared: Prepared, split: str) -> list[list[tuple[int, ...]]]:
    """Of each source."""
    return [records(split, source) for source in prepared.sources]


def batches(prepared: Prepared, **options):
    return training_batches(prepared, **{"seq_len": SEQ_LEN, "batch_size": BATCH, "seed": 0, **options})


def sources_of_rows(prepared: Prepared, rows: list[Batch]) -> list[int]:
    """Which source each row comes from, by the tokens that occur in the documents of one alone."""
    vocabularies = [{token for document in found for token in document} for found in documents(prepared, "train")]
    own = [known.difference(*vocabularies[:i], *vocabularies[i + 1 :]) for i, known in enumerate(vocabularies)]
    of_row = [[np.isin(row, list(tokens)).sum() for tokens in own] for batch in rows for row in batch["tokens"]]
    return [int(np.argmax(counts)) for counts in of_row]


def flat(rows: list[Batch]) -> list[tuple[int, int]]:
    """All (token, target) pairs, sorted."""
    tokens, targets = (np.concatenate([batch[name].ravel() for batch in rows]) for name in ("tokens", "targets"))
    return sorted(zip(tokens[targets != IGNORED].tolist(), targets[targets != IGNORED].tolist()))


def all_pairs(prepared: Prepared, split: str = "train") -> list[tuple[int, int]]:
    return sorted(pair for found in documents(prepared, split) for document in found for pair in itertools.pairwise(document))


def test_an_epoch_holds_every_pair_of_every_source_once(prepared: Prepared):
    assert flat(list(batches(prepared, repeat=False))) == all_pairs(prepared)


def test_without_weights_all_documents_go_through_one_shuffle(plain: Prepared):
    order = unpack(list(batches(plain, repeat=False)), plain)
    where = [next(i for i, found in enumerate(documents(plain, "train")) if document in found) for document in order]
    assert sorted(order) == sorted(itertools.chain(*documents(plain, "train")))
    assert np.count_nonzero(np.diff(where)) > 20


def test_weights_are_shares_of_tokens_whatever_the_sizes(weighted: Prepared):
    rows = take(batches(weighted), 150)
    assert all((batch["targets"] != IGNORED).all() for batch in rows)
    origin = np.array(sources_of_rows(weighted, rows))
    for index, share in enumerate(SHARES):
        taken = np.cumsum(origin == index)
        np.testing.assert_allclose(taken, share * np.arange(1, len(origin) + 1), atol=1.5)  # at every moment


def test_resume_goes_on_bit_for_bit(prepared: Prepared):
    def fresh():
        return batches(prepared)

    original = fresh()
    states, expected = [], []
    for _ in range(80):  # several epochs of the small source
        states.append(json.dumps(original.get_state()))
        expected.append(next(original))
    for index in range(0, 77, 4):
        resumed = fresh()
        resumed.set_state(json.loads(states[index]))
        assert json.dumps(resumed.get_state()) == states[index]
        assert same(take(resumed, 3), expected[index : index + 3])


def test_resume_near_the_end_of_an_epoch(weighted: Prepared):
    def fresh():
        return batches(weighted, repeat=False)

    original = fresh()
    states, expected = [], []
    for batch in original:
        expected.append(batch)
        states.append(json.dumps(original.get_state()))
    for back in range(1, 20):
        resumed = fresh()
        resumed.set_state(json.loads(states[-back - 1]))
        assert same(list(resumed), expected[-back:])
    original.set_state(json.loads(states[10]))  # set back after its end
    assert same(list(original), expected[11:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 2}, "sequences 4, now 2"),
        ({"seq_len": 8}, "sequence length 16, now 8"),
        ({"seed": 1}, "seed 0, now 1"),
    ],
)
def test_a_position_of_another_setting_is_refused(weighted: Prepared, change: dict, message: str):
    state = batches(weighted).get_state()
    with pytest.raises(UserError, match=f"does not fit: it was saved with {message}"):
        batches(weighted, **change).set_state(state)


def test_a_position_in_other_text_is_refused(plain: Prepared, weighted: Prepared):
    state = batches(weighted).get_state()
    for other in (plain, dataclasses.replace(weighted, weights=(1.0, 1.0, 1.0)), dataclasses.replace(plain, sources=plain.sources[:1])):
        with pytest.raises(UserError, match="saved with text"):
            batches(other).set_state(state)
    with pytest.raises(UserError, match="text not recorded"):
        batches(weighted).set_state({"position": 3})


def test_threads_and_workers_change_nothing(weighted: Prepared):
    expected = take(batches(weighted), 30)
    assert same(take(batches(weighted, read_threads=1), 30), expected)
    iterator = batches(weighted, workers=1)
    assert same(take(iterator, 30), expected)
    iterator.close()


def test_heldout_rows_follow_the_weights_and_never_the_training(prepared: Prepared):
    rows = heldout_batches(prepared, seq_len=SEQ_LEN, sequences=12, batch_size=4)
    assert same(rows, heldout_batches(prepared, seq_len=SEQ_LEN, sequences=12, batch_size=4))
    assert all((batch["targets"] != IGNORED).all() for batch in rows)
    origin = sources_of_rows(prepared, rows)
    if prepared.weights:
        assert origin == [0] * 3 + [1] * 8 + [2]
    trained = {document for found in documents(prepared, "train") for document in found}
    assert trained.isdisjoint(document for found in documents(prepared, "heldout") for document in found)


def test_one_heldout_source_too_short(weighted: Prepared):
    with pytest.raises(
        UserError, match=r"held-out text of .*1\.jsonl has \d+ sequences of 500 tokens, but train\.eval_sequences asks for 70"
    ):
        heldout_batches(dataclasses.replace(weighted, weights=(1e-6, 1.0, 1e-6)), seq_len=500, sequences=70, batch_size=7)


def test_apportion():
    assert apportion((0.5, 0.25, 0.25), 8) == [4, 2, 2]
    assert apportion((0.5, 0.3, 0.2), 4) == [2, 1, 1]
    rng = np.random.default_rng(0)
    for _ in range(50):
        shares = rng.dirichlet(np.ones(4))
        counts = apportion(shares, 37)
        assert sum(counts) == 37
        assert (abs(np.array(counts) - shares * 37) < 1).all()


def test_description_counts_each_source(plain: Prepared, weighted: Prepared):
    consumed = 3 * plain.train_pairs
    described = plain.describe(consumed)
    assert [source["epochs"] for source in described["sources"]] == pytest.approx([3, 3, 3])
    assert (described["epochs"], described["unique_tokens"]) == (pytest.approx(3), plain.train_pairs)

    described = weighted.describe(consumed)
    assert [source["share"] for source in described["sources"]] == pytest.approx(list(SHARES))
    expected = [share * consumed / source.train_pairs for share, source in zip(SHARES, weighted.sources)]
    assert [source["epochs"] for source in described["sources"]] == pytest.approx(expected)
    assert described["epochs"] == pytest.approx(max(expected))
    assert described["unique_tokens"] == sum(min(round(s * consumed), p.train_pairs) for s, p in zip(SHARES, weighted.sources))
    assert json.loads(json.dumps(described)) == described


def test_entropy_and_bytes_are_those_of_the_mixture(plain: Prepared, weighted: Prepared):
    counts = [np.bincount(np.concatenate([np.array(d) for d in found]), minlength=VOCAB) for found in documents(plain, "heldout")]
    assert plain.heldout_unigram_entropy == pytest.approx(unigram_entropy(sum(counts)))
    mixed = sum(share * count / count.sum() for share, count in zip(SHARES, counts))
    assert weighted.heldout_unigram_entropy == pytest.approx(-(mixed[mixed > 0] * np.log(mixed[mixed > 0])).sum())
    of_source = [source.heldout_bytes / source.heldout_tokens for source in weighted.sources]
    assert weighted.bytes_per_token == pytest.approx(np.dot(SHARES, of_source))


def test_sources_share_a_tokenizer_and_a_new_one_leaves_the_others_alone(config: DataConfig, plain: Prepared, tmp_path: Path):
    assert len({source.tokenizer_fingerprint for source in plain.sources}) == 1
    given = dataclasses.replace(config, tokenizer=str(plain.sources[0].tokenizer))
    two = prepare(dataclasses.replace(given, source=config.source[:2]), VOCAB)
    lines: list[str] = []
    three = prepare(given, VOCAB, progress=lines.append)
    assert [source.folder for source in three.sources[:2]] == [source.folder for source in two.sources]
    assert sum(line.startswith("tokenising") for line in lines) == 1
    # A tokenizer that is trained here depends on the text of all.
    alone = prepare(dataclasses.replace(config, source=config.source[:1]), VOCAB)
    assert alone.tokenizer_fingerprint != plain.tokenizer_fingerprint
