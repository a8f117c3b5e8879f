"""Which documents are held out, and how many bad records are borne."""

import json
import random
from pathlib import Path

import pytest
from small_corpus import documents, texts, write_array_record

from mhc_jax.errors import UserError

SHARE = 0.2


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def write_lines(path: Path, lines: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return str(path)


def sides(source: str, cache: Path, **options) -> tuple[list[str], list[str]]:
    """Training and held-out texts."""
    everything = list(documents(source, cache, **options))
    return [text for text, held in everything if not held], [text for text, held in everything if held]


def test_split_is_a_partition_near_the_asked_share(tmp_path: Path, cache: Path):
    written = texts(2000)
    train, heldout = sides(write_lines(tmp_path / "a.jsonl", written), cache)
    assert sorted(train + heldout) == sorted(written)
    assert abs(len(heldout) / 2000 - SHARE) < 0.03


def test_a_record_stays_on_its_side_when_records_and_files_come_and_go(tmp_path: Path, cache: Path):
    written = texts(500)
    _, few = sides(write_lines(tmp_path / "few.jsonl", written[:100]), cache)
    moved = written[:]
    random.Random(0).shuffle(moved)
    write_lines(tmp_path / "x1.jsonl", moved[:200])
    write_array_record(tmp_path / "x2.array_record", [text.encode() for text in moved[200:]])
    train, heldout = sides(f"{tmp_path}/x*", cache)
    assert set(few) == set(heldout) & set(written[:100])
    assert sorted(train + heldout) == sorted(written)


def test_equal_records_lie_on_the_same_side(tmp_path: Path, cache: Path):
    train, heldout = sides(write_lines(tmp_path / "a.jsonl", texts(50) * 3), cache)
    assert heldout
    assert set(train).isdisjoint(heldout)


def test_a_whole_file_stays_on_its_side_when_files_are_added_or_edited(tmp_path: Path, cache: Path):
    for i in range(100):
        (tmp_path / f"{i}.txt").write_text(str(i))
    before = sides(f"{tmp_path}/*.txt", cache)
    for i in range(100, 300):
        (tmp_path / f"{i}.txt").write_text(str(i))
    for i in range(50):
        (tmp_path / f"{i}.txt").write_text(f"{i} edited")
    after = sides(f"{tmp_path}/*.txt", cache)
    for old, new in zip(before, after):
        assert set(old) <= {text.removesuffix(" edited") for text in new}


@pytest.mark.parametrize("share", [1e-9, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_split_leaves_no_side_empty(tmp_path: Path, cache: Path, count: int, share: float):
    train, heldout = sides(write_lines(tmp_path / "a.jsonl", texts(count)), cache, heldout_share=share)
    assert train
    assert heldout
    assert len(train) + len(heldout) == count


def test_one_document_cannot_be_split(tmp_path: Path, cache: Path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match=r"has only 1 document, but at least 2 different ones are needed.*split -C"):
        sides(f"{tmp_path}/a.txt", cache)
    with pytest.raises(UserError, match="has only 3 equal documents"):
        sides(write_lines(tmp_path / "a.jsonl", ["same"] * 3), cache)


def test_stdlib_is_held_out_to_about_the_default_share(cache: Path):
    train, heldout = (sum(map(len, side)) for side in sides("stdlib", cache, heldout_share=0.05, max_bad_records=100))
    assert 0.01 < heldout / (train + heldout) < 0.15


def test_bad_records_are_skipped_and_counted_up_to_the_limit(tmp_path: Path, cache: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": ""}\nnothing\n{"text": "two"}\n{"txt": "three"}\n{"text": 3}\n')
    survey = documents(str(path), cache, max_bad_records=3).survey  # nothing is wrong with an empty document
    assert survey.documents == 2
    assert survey.skipped == {"empty": 1, "no text": 2, "not JSON": 1}
    assert survey.first_bad.startswith(f"{path}, record 3 is not JSON")
    with pytest.raises(UserError) as error:
        _ = documents(str(path), cache, max_bad_records=2).survey
    message = str(error.value)
    for fragment in ("more bad records than data.max_bad_records = 2", "record 3 is not JSON", f"{path}, record 6 holds a number", "raise"):
        assert fragment in message
    with pytest.raises(UserError, match=r"data\.max_bad_records = 0 allows\. The one too many: .*, record 3 is not JSON"):
        _ = documents(str(path), cache, max_bad_records=0).survey


def test_corpus_without_text(tmp_path: Path, cache: Path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xff")
    (tmp_path / "b.txt").write_bytes(b"")
    with pytest.raises(UserError, match=r"has no document that can be read \(the first: .*a\.txt is not UTF-8"):
        sides(f"{tmp_path}/*.txt", cache, max_bad_records=10)
    with pytest.raises(UserError, match=r"has no document that can be read \(all are empty\)"):
        sides(f"{tmp_path}/b.txt", cache, max_bad_records=0)
