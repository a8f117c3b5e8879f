"""Which files a source has, and what identifies their content."""

import os
import shutil
import sysconfig
import time
from pathlib import Path

import pytest

from mhc_jax.data import digests
from mhc_jax.data.corpus import scan
from mhc_jax.data.formats import Record
from mhc_jax.errors import UserError


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_scan_takes_every_file_by_its_relative_name(corpus_folder: Path, cache: Path):
    names = [part.name for part in scan(f"{corpus_folder}/**/*.txt", cache).parts]
    assert len(names) == 62
    assert names == sorted(names)
    assert names[0] == "a/001.txt"


def test_text_is_read_unchanged(tmp_path: Path, cache: Path):
    (tmp_path / "x.txt").write_bytes("a\r\nnaïve".encode())
    (part,) = scan(f"{tmp_path}/*.txt", cache).parts
    assert list(part.records("text")) == [Record(0, "a\r\nnaïve")]


def test_fingerprint_depends_on_names_and_contents_but_not_on_the_place(corpus_folder: Path, tmp_path: Path, cache: Path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(corpus_folder, copy)
    original = scan(f"{corpus_folder}/**/*.txt", cache).fingerprint
    assert scan(f"{copy}/**/*.txt", cache).fingerprint == original
    monkeypatch.chdir(copy)
    assert scan("**/*.txt", cache).fingerprint == original

    (copy / "a/001.txt").rename(copy / "a/renamed.txt")
    renamed = scan(f"{copy}/**/*.txt", cache).fingerprint
    (copy / "a/003.txt").write_text("other")
    changed = scan(f"{copy}/**/*.txt", cache).fingerprint
    assert len({original, renamed, changed}) == 3


def test_a_file_that_has_rested_is_hashed_once(tmp_path: Path, cache: Path, monkeypatch):
    old, new = tmp_path / "old.txt", tmp_path / "new.txt"
    for path in (old, new):
        path.write_text(path.name)
    os.utime(old, (time.time() - 60, time.time() - 60))
    hashed = []
    sha256 = digests._sha256

    def spy(path: Path) -> str:
        hashed.append(path.name)
        return sha256(path)

    monkeypatch.setattr(digests, "_sha256", spy)
    first = scan(f"{tmp_path}/*.txt", cache).fingerprint
    assert scan(f"{tmp_path}/*.txt", cache).fingerprint == first
    assert sorted(hashed) == ["new.txt", "new.txt", "old.txt"]  # the new one could still change unnoticed

    old.write_text("OLD.txt")  # the same size
    assert scan(f"{tmp_path}/*.txt", cache).fingerprint != first


@pytest.mark.parametrize("content", ["", "{", "[]", '{"x": 3}', "\x00"])
def test_a_damaged_memory_of_digests_is_no_harm(tmp_path: Path, cache: Path, content: str):
    (tmp_path / "a.txt").write_text("text")
    os.utime(tmp_path / "a.txt", (1, 1))
    first = scan(f"{tmp_path}/*.txt", cache).fingerprint
    (memory,) = (cache / "digests").iterdir()
    memory.write_text(content)
    assert scan(f"{tmp_path}/*.txt", cache).fingerprint == first
    assert str(tmp_path / "a.txt") in memory.read_text()


def test_a_cache_that_cannot_be_written_is_no_harm(tmp_path: Path):
    (tmp_path / "a.txt").write_text("text")
    os.utime(tmp_path / "a.txt", (1, 1))
    (tmp_path / "file").write_text("")
    assert len(scan(f"{tmp_path}/a.txt", tmp_path / "file").parts) == 1


def test_glob_that_matches_nothing(tmp_path: Path, cache: Path):
    with pytest.raises(UserError, match=r"matches no file; check the path, or use 'stdlib'"):
        scan(f"{tmp_path}/*.txt", cache)


def test_folder_instead_of_a_glob(tmp_path: Path, cache: Path):
    with pytest.raises(UserError, match=r"matches no file; to read a folder, write '.*/\*\*/\*\.txt'"):
        scan(str(tmp_path), cache)


def test_unreadable_file(tmp_path: Path, cache: Path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")

    def refuse(path: Path, *args, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)  # file modes do not stop a superuser
    with pytest.raises(UserError, match=r"cannot read .*a\.txt: Permission denied"):
        scan(f"{tmp_path}/*.txt", cache)


def test_file_that_changes_after_the_scan(tmp_path: Path, cache: Path):
    (tmp_path / "a.txt").write_text("before")
    (part,) = scan(f"{tmp_path}/*.txt", cache).parts
    (tmp_path / "a.txt").write_text("after")
    with pytest.raises(UserError, match=r"a\.txt changed while the corpus was being read"):
        list(part.records("text"))


def test_file_that_changes_while_it_is_read(tmp_path: Path, cache: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n')
    (part,) = scan(str(path), cache).parts
    records = part.records("text")
    assert next(records) == Record(1, "one")
    with path.open("a") as file:
        file.write('{"text": "two"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl changed while the corpus was being read"):
        list(records)


def test_stdlib_is_the_interpreters_own_source_without_test_suites(cache: Path):
    corpus = scan("stdlib", cache)
    names = {part.name for part in corpus.parts}
    assert {"os.py", "json/decoder.py", "asyncio/events.py"} <= names
    assert not any(part in ("test", "tests", "site-packages") for name in names for part in name.split("/"))
    assert corpus.parts[0].place.startswith(sysconfig.get_paths()["stdlib"])
    assert sum(os.path.getsize(part.place) for part in corpus.parts) > 5_000_000
