"""The file of a run's hash: what is saved comes back, and anything else is refused with one message."""

import dataclasses
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzz.mutate import damage_json
from ngrams_made import SMALL

from mhc_jax.data.ngrams.artifact import EngramArtifact, build_artifact, load_artifact, open_artifact, save_artifact
from mhc_jax.data.ngrams.hashing import NgramHash
from mhc_jax.data.prepared import Prepared
from mhc_jax.data.tokenizer import load_tokenizer, train_tokenizer
from mhc_jax.engram_config import EngramConfig
from mhc_jax.errors import UserError

TOKENIZER = train_tokenizer(["The streams of the Residual stream", "The rows of THE streams"], 290)
WHOLE = EngramConfig(layers=(1, 3), table_sizes=(9000, 20_000, 101), orders=(2, 3, 4), heads=3, seed=5)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, EngramArtifact]:
    path, artifact = tmp_path / "engram.json", build_artifact(WHOLE, TOKENIZER)
    save_artifact(artifact, path)
    return path, artifact


def forge(path: Path, change) -> None:
    """Changes the content and corrects the checksum, as somebody who edits the file on purpose can."""
    content = json.loads(path.read_text())["content"]
    change(content)
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({"content": content, "sha256": digest}))


def load(path: Path, **changes: Any) -> EngramArtifact:
    return load_artifact(path, **{"config": WHOLE, "tokenizer": TOKENIZER.fingerprint, **changes})


def test_what_is_saved_comes_back_to_the_last_bit(saved):
    path, artifact = saved
    back = load(path)
    for field in dataclasses.fields(EngramArtifact):
        ours, theirs = getattr(back, field.name), getattr(artifact, field.name)
        assert np.array_equal(ours, theirs) if isinstance(ours, np.ndarray) else ours == theirs
        assert not isinstance(ours, np.ndarray) or ours.dtype == theirs.dtype
    assert back.checksum == artifact.checksum


def test_the_same_is_built_every_time_and_another_for_another_config_or_tokenizer():
    other = train_tokenizer(["of another text"], 290)
    same, *others = (
        build_artifact(config, tokenizer).checksum
        for config, tokenizer in ((WHOLE, TOKENIZER), (dataclasses.replace(WHOLE, seed=6), TOKENIZER), (WHOLE, other))
    )
    assert same == build_artifact(WHOLE, TOKENIZER).checksum
    assert len({same, *others}) == 3


def test_tables_lie_one_after_the_other():
    artifact = build_artifact(SMALL, TOKENIZER)
    assert artifact.offsets.tolist() == [[0, 101, 204, 311], [0, 113, 240, 371]]
    assert artifact.rows.tolist() == [420, 508]
    assert artifact.offsets.dtype == np.int64


def test_compression_merges_tokens_of_a_trained_tokenizer_and_can_be_left_out():
    artifact = build_artifact(SMALL, TOKENIZER)
    assert artifact.classes < TOKENIZER.size
    whole = build_artifact(dataclasses.replace(SMALL, compression=False), TOKENIZER)
    assert whole.lookup.tolist() == list(range(TOKENIZER.size))
    assert artifact.multipliers.tolist() != whole.multipliers.tolist()  # their bound depends on the number of classes


def test_padding_is_end_of_text_or_the_token_given():
    assert build_artifact(SMALL, TOKENIZER).pad == build_artifact(SMALL, TOKENIZER).lookup[TOKENIZER.end_of_text]
    given = build_artifact(dataclasses.replace(SMALL, pad_id=70), TOKENIZER)
    assert given.pad == given.lookup[70]
    with pytest.raises(UserError, match=rf"model\.engram\.pad_id is 5000, but the tokenizer's ids are 0 to {TOKENIZER.size - 1}"):
        build_artifact(dataclasses.replace(SMALL, pad_id=5000), TOKENIZER)


def test_another_tokenizer_is_refused(saved):
    with pytest.raises(UserError, match=rf"engram\.json was made for another tokenizer .*{TOKENIZER.fingerprint[:12]}"):
        load(saved[0], tokenizer="0" * 64)


def test_another_layout_is_refused_and_what_differs_is_named(saved):
    with pytest.raises(UserError, match=r"another layout of model\.engram: heads 3, now 8; seed 5, now 0"):
        load(saved[0], config=dataclasses.replace(WHOLE, heads=8, seed=0))


def test_any_changed_character_is_noticed(saved):
    path, artifact = saved
    text, rng = path.read_text(), random.Random(0)
    for at in rng.sample(range(len(text)), 300):
        other = rng.choice([c for c in '0123456789abc"[]{}, ' if c != text[at]])
        path.write_text(text[:at] + other + text[at + 1 :])
        try:
            assert load(path).checksum == artifact.checksum  # white space
        except UserError as error:
            assert "is damaged" in str(error)
        else:
            assert {other, text[at]} <= set(" \n0")


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"content": {}}', '{"content": 3, "sha256": "x"}', "[" * 100_000, "\udcff"])
def test_a_file_that_is_something_else_is_refused(tmp_path, content):
    path = tmp_path / "engram.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"engram\.json is damaged"):
        load(path)


def test_a_file_cut_short_is_refused(saved):
    path, _ = saved
    path.write_text(path.read_text()[:-40])
    with pytest.raises(UserError, match=r"engram\.json is damaged \(it cannot be read\)"):
        load(path)


def test_a_missing_file_and_one_of_another_format_are_refused(saved):
    path, _ = saved
    with pytest.raises(UserError, match=r"cannot read .*none\.json"):
        load(path.with_name("none.json"))
    forge(path, lambda content: content.update(format=2))
    with pytest.raises(UserError, match="has the format 2, not 1"):
        load(path)


FORGED = {
    "a multiplier that overflows": lambda c: c["multipliers"][0].__setitem__(1, str(2**62 + 1)),
    "a negative multiplier": lambda c: c["multipliers"][0].__setitem__(1, "-5"),
    "a multiplier of 70 bits": lambda c: c["multipliers"][0].__setitem__(1, str(2**70)),
    "a multiplier too few": lambda c: c["multipliers"][0].pop(),
    "a layer too few": lambda c: c["primes"].pop(),
    "a table of one row": lambda c: c["primes"][0][0].__setitem__(0, 1),
    "more rows than int32 numbers": lambda c: c["primes"][0][0].__setitem__(0, 2**31),
    "an even number of rows": lambda c: c["primes"][0][0].__setitem__(0, 9000),
    "half a class": lambda c: c["lookup"].__setitem__(3, 1.5),
    "no tokenizer": lambda c: c.update(tokenizer=3),
    "no tokens": lambda c: c.update(lookup=[]),
    "a negative class": lambda c: c["lookup"].__setitem__(3, -1),
    "a class of text": lambda c: c["lookup"].__setitem__(3, "x"),
    "padding that is no class": lambda c: c.update(pad=10**6),
    "padding of text": lambda c: c.update(pad="x"),
    "no primes": lambda c: c.pop("primes"),
    "a config with another field": lambda c: c["config"].update(colour=3),
    "a config that is a list": lambda c: c.update(config=[]),
    "a config without layers": lambda c: c["config"].update(layers=[]),
    "orders of nothing": lambda c: c["config"].update(orders=[]),
    "orders of text": lambda c: c["config"].update(orders=["x"]),
}


@pytest.mark.parametrize("what", FORGED)
def test_a_forged_file_that_does_not_fit_together_is_refused(saved, what):
    forge(saved[0], FORGED[what])
    with pytest.raises(UserError, match=r"engram\.json is damaged"):
        load(saved[0])


def test_whatever_a_forged_file_holds_is_refused_or_can_be_used(saved):
    path, _ = saved
    content, tokens, refused = json.loads(path.read_text())["content"], np.arange(6, dtype=np.int32)[None], 0
    for seed in range(300):
        changed, what = damage_json(random.Random(seed), content, 1)
        path.write_text(
            json.dumps({"content": changed, "sha256": hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()})
        )
        try:
            loaded = load(path)
        except UserError:
            refused += 1
            continue
        assert loaded.config == WHOLE, what
        rows = NgramHash(loaded).rows(tokens % loaded.lookup.size, np.ones_like(tokens))
        assert (rows >= loaded.offsets).all(), what
        assert (rows < loaded.offsets + loaded.primes.reshape(2, -1)).all(), what
    assert 100 < refused < 300  # some changes make another artifact that is sound in itself


def test_a_run_folder_keeps_its_file(prepared: Prepared, tmp_path: Path):
    built = open_artifact(tmp_path, SMALL, prepared)
    assert built.checksum == build_artifact(SMALL, load_tokenizer(prepared.sources[0].tokenizer, 10_000)).checksum
    assert not list(tmp_path.iterdir())
    # What a run began with stays, whatever would be computed today.
    frozen = dataclasses.replace(built, multipliers=built.multipliers + 2)
    save_artifact(frozen, tmp_path / "engram.json")
    assert open_artifact(tmp_path, SMALL, prepared).checksum == frozen.checksum != built.checksum
