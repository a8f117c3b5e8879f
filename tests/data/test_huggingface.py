"""Hugging Face data sets from local folders, and what is said where one cannot be had."""

import json
import os
import sys
from pathlib import Path

import datasets
import pytest
from small_corpus import VOCAB, documents, texts

from mhc_jax.config import DataConfig
from mhc_jax.data.corpus import scan
from mhc_jax.data.formats import BadRecord, Record
from mhc_jax.data.huggingface import parse
from mhc_jax.data.prepare import prepare
from mhc_jax.errors import UserError

TEXTS = texts(40)


@pytest.fixture(autouse=True)
def own_library_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files that the library reads: a split "train" and a split "test"."""
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(TEXTS)))
    (folder / "test.jsonl").write_text("".join(json.dumps({"text": f"test {i}", "id": i}) + "\n" for i in range(5)))
    return folder


def records(source: str, cache: Path, field: str = "text") -> list[Record | BadRecord]:
    (part,) = scan(source, cache).parts
    return list(part.records(field))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("hf:a/b", ("a/b", None, "train")),
        ("hf:a/b@test", ("a/b", None, "test")),
        ("hf:a/b:en", ("a/b", "en", "train")),
        ("hf:a/b:20231101.en@train[:10%]", ("a/b", "20231101.en", "train[:10%]")),
    ],
)
def test_names(source: str, expected: tuple[str, str | None, str]):
    assert parse(source) == expected


def test_a_source_without_a_name():
    with pytest.raises(UserError, match="write hf:NAME, hf:NAME:CONFIG"):
        parse("hf:@train")


def test_a_folder_of_files(folder: Path, cache: Path):
    assert records(f"hf:{folder}", cache) == [Record(i, text) for i, text in enumerate(TEXTS, start=1)]
    assert [r.text for r in records(f"hf:{folder}@test", cache) if isinstance(r, Record)] == [f"test {i}" for i in range(5)]
    assert len(records(f"hf:{folder}@train[:10%]", cache)) == 4


def test_saved_data_sets(tmp_path: Path, cache: Path):
    train, test = (datasets.Dataset.from_dict({"content": lines}) for lines in (TEXTS, TEXTS[:3]))
    train.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "two")
    expected = [Record(i, text) for i, text in enumerate(TEXTS, start=1)]
    assert records(f"hf:{tmp_path}/one", cache, "content") == expected
    assert records(f"hf:{tmp_path}/two", cache, "content") == expected
    assert records(f"hf:{tmp_path}/two@test", cache, "content") == expected[:3]


def test_fingerprint_follows_the_content(folder: Path, cache: Path):
    first = scan(f"hf:{folder}", cache).fingerprint
    assert scan(f"hf:{folder}", cache).fingerprint == first
    assert scan(f"hf:{folder}@train[:50%]", cache).fingerprint != first
    (folder / "train.jsonl").write_text('{"text": "other", "id": 1}\n')
    os.utime(folder / "train.jsonl", (1, 1))
    assert scan(f"hf:{folder}", cache).fingerprint != first


def test_bad_rows_are_counted(tmp_path: Path, cache: Path):
    datasets.Dataset.from_dict({"text": ["one", None, "", "four"]}).save_to_disk(tmp_path / "one")
    survey = documents(f"hf:{tmp_path}/one", cache, max_bad_records=2).survey
    assert (survey.documents, survey.skipped) == (2, {"empty": 1, "no text": 1})
    with pytest.raises(UserError, match=r"one, record 2 is null|one, record 2 holds"):
        _ = documents(f"hf:{tmp_path}/one", cache, max_bad_records=0).survey


def test_prepared_like_any_other_source(folder: Path):
    lines: list[str] = []
    prepared = prepare(DataConfig(seq_len=32, source=(f"hf:{folder}",), heldout_share=0.2), VOCAB, progress=lines.append)
    assert prepared.sources[0].train_documents + prepared.sources[0].heldout_documents == len(TEXTS)
    lines.clear()
    assert prepare(DataConfig(seq_len=32, source=(f"hf:{folder}",), heldout_share=0.2), VOCAB, progress=lines.append) == prepared
    assert len(lines) == 1


def test_unknown_column_and_split(folder: Path, cache: Path):
    with pytest.raises(UserError, match=r"has no column 'content'; set data\.text_field to one of text, id"):
        records(f"hf:{folder}", cache, "content")
    with pytest.raises(UserError, match=r"@validation' cannot be loaded \(.*check its config and split"):
        records(f"hf:{folder}@validation", cache)


def test_a_data_set_that_is_a_program_is_not_run(tmp_path: Path, cache: Path):
    (tmp_path / "program").mkdir()
    (tmp_path / "program/program.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    with pytest.raises(UserError, match="cannot be loaded"):
        records(f"hf:{tmp_path}/program", cache)
    assert not (tmp_path / "executed").exists()


def test_without_the_network(cache: Path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"'hf:nobody/nothing' cannot be loaded \(.*check the name and the network"):
        records("hf:nobody/nothing", cache)


def test_without_the_package(cache: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"'hf:a/b' needs the package datasets; pip install 'mhc-jax\[data\]'"):
        scan("hf:a/b", cache)
