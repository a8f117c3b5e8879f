"""Training a byte-level BPE, and taking a given tokenizer."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from mhc_jax.data.tokenizer import END_OF_TEXT, END_OF_TEXT_NAMES, load_tokenizer, train_tokenizer
from mhc_jax.errors import UserError

TEXTS = ["the stream of the residual stream", "naïve mixing\n\tof streams 流", "doubly stochastic mixing"]


def words_tokenizer(*words: str) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def test_any_text_comes_back():
    tokenizer = train_tokenizer(TEXTS, 280)
    for text in [*TEXTS, "unseen: Ωμέγα 🦜 \r\n\0", " leading and trailing ", END_OF_TEXT]:
        (ids,) = tokenizer.encode([text])
        assert Tokenizer.from_str(tokenizer.json).decode(ids.tolist(), skip_special_tokens=False) == text
        assert ids.max() < tokenizer.size


def test_end_of_text_spelt_out_is_ordinary_text():
    tokenizer = train_tokenizer(TEXTS, 280)
    (ids,) = tokenizer.encode([f"a{END_OF_TEXT}b"])
    assert tokenizer.end_of_text not in ids


def test_training_is_deterministic():
    assert train_tokenizer(TEXTS, 280).fingerprint == train_tokenizer(TEXTS, 280).fingerprint
    assert train_tokenizer(TEXTS, 280).fingerprint != train_tokenizer(TEXTS[:2], 280).fingerprint


def test_vocabulary_is_at_most_what_was_asked():
    assert train_tokenizer(TEXTS, 257).size == 257
    assert train_tokenizer(TEXTS, 270).size == 270
    assert 270 < train_tokenizer(TEXTS, 100_000).size < 400  # so little text has no more merges


def test_vocabulary_below_the_bytes():
    with pytest.raises(UserError, match=r"model\.vocab_size is 256, but .* at least 257"):
        train_tokenizer(TEXTS, 256)


def test_given_tokenizer_encodes_like_the_original(tmp_path: Path):
    trained = train_tokenizer(TEXTS, 280)
    path = tmp_path / "tokenizer.json"
    path.write_text(trained.json, encoding="utf-8")
    loaded = load_tokenizer(path, vocab_size=280)
    assert (loaded.fingerprint, loaded.size, loaded.end_of_text) == (trained.fingerprint, trained.size, trained.end_of_text)
    for ours, theirs in zip(loaded.encode(TEXTS), trained.encode(TEXTS)):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", END_OF_TEXT_NAMES)
def test_common_names_of_end_of_text(tmp_path: Path, name: str):
    words_tokenizer("<unk>", "the", name).save(str(tmp_path / "t.json"))
    assert load_tokenizer(tmp_path / "t.json", vocab_size=3).end_of_text == 2


def test_given_tokenizer_does_not_cut_or_pad(tmp_path: Path):
    tokenizer = words_tokenizer("<unk>", "the", "</s>")
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=4)
    tokenizer.save(str(tmp_path / "t.json"))
    assert [len(ids) for ids in load_tokenizer(tmp_path / "t.json", 3).encode(["the", "the the the"])] == [1, 3]


def test_given_tokenizer_larger_than_the_model(tmp_path: Path):
    words_tokenizer("<unk>", "the", "of", "</s>").save(str(tmp_path / "t.json"))
    with pytest.raises(UserError, match=r"has 4 tokens, more than model\.vocab_size = 3"):
        load_tokenizer(tmp_path / "t.json", vocab_size=3)


def test_gaps_between_ids_count(tmp_path: Path):
    tokenizer = Tokenizer(models.WordLevel({"</s>": 0, "far": 99}, unk_token="far"))
    tokenizer.save(str(tmp_path / "t.json"))
    assert load_tokenizer(tmp_path / "t.json", vocab_size=100).size == 100


def test_given_tokenizer_without_end_of_text(tmp_path: Path):
    words_tokenizer("<unk>", "the").save(str(tmp_path / "t.json"))
    with pytest.raises(UserError, match=r"has no end-of-text token; it needs one of <\|endoftext\|>"):
        load_tokenizer(tmp_path / "t.json", vocab_size=10)


def test_missing_tokenizer(tmp_path: Path):
    with pytest.raises(UserError, match=r"cannot read .*none\.json: No such file or directory; give the path of a tokenizer\.json"):
        load_tokenizer(tmp_path / "none.json", vocab_size=300)


@pytest.mark.parametrize("content", [b"", b"not json", b"\xff\xfe", json.dumps({"vocab_size": 300}).encode()])
def test_file_that_is_no_tokenizer(tmp_path: Path, content: bytes):
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(UserError, match=r"t\.json is not a tokenizer"):
        load_tokenizer(tmp_path / "t.json", vocab_size=300)


def changed(path: Path, **model) -> Path:
    """A trained tokenizer's file with fields of its model changed."""
    data = json.loads(train_tokenizer(TEXTS, 280).json)
    data["model"].update(model)
    path.write_text(json.dumps(data))
    return path


def test_a_file_at_which_the_library_panics(tmp_path: Path):
    with pytest.raises(UserError, match=r"t\.json is not a tokenizer"):
        load_tokenizer(changed(tmp_path / "t.json", continuing_subword_prefix="##########"), vocab_size=280)


def test_one_id_for_two_tokens(tmp_path: Path):
    vocab = json.loads(train_tokenizer(TEXTS, 280).json)["model"]["vocab"]
    with pytest.raises(UserError, match="gives one id to several tokens"):
        load_tokenizer(changed(tmp_path / "t.json", vocab={**vocab, "a": vocab["b"]}), vocab_size=280)


def test_random_merges_are_turned_off(tmp_path: Path):
    loaded = load_tokenizer(changed(tmp_path / "t.json", dropout=0.9), vocab_size=280)
    for ours, theirs in zip(loaded.encode(TEXTS), train_tokenizer(TEXTS, 280).encode(TEXTS)):
        np.testing.assert_array_equal(ours, theirs)


def test_text_that_a_given_tokenizer_cannot_encode(tmp_path: Path):
    Tokenizer(models.WordLevel({"</s>": 0}, unk_token="missing")).save(str(tmp_path / "t.json"))
    with pytest.raises(UserError, match="cannot encode this text"):
        load_tokenizer(tmp_path / "t.json", vocab_size=3).encode(["word"])


def test_a_vocabulary_beyond_any_use():
    with pytest.raises(UserError, match=r"model\.vocab_size is 1000000000; .* at most"):
        train_tokenizer(TEXTS, 10**9)
