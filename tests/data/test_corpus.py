"""Which files belong to a corpus, and which of them are held out."""

import os
import shutil
import sysconfig
from pathlib import Path

import pytest

from mhc_jax.data.corpus import Document, File, read_documents, scan, split
from mhc_jax.errors import UserError

SHARE = 0.2


def files(count: int) -> list[File]:
    return [File(f"{i}.txt", Path(f"{i}.txt"), "") for i in range(count)]


def test_scan_takes_every_text_file_by_its_relative_name_and_counts_the_rest(corpus_folder: Path):
    corpus = scan(f"{corpus_folder}/**/*.txt")
    assert len(corpus.files) == 60
    assert corpus.skipped == 2  # one is empty, one is not UTF-8
    assert [file.name for file in corpus.files] == sorted(file.name for file in corpus.files)
    assert corpus.files[0].name == "a/001.txt"


def test_read_documents_gives_the_text_unchanged(tmp_path: Path):
    (tmp_path / "x.txt").write_bytes("a\r\nnaïve".encode())
    assert list(read_documents(scan(f"{tmp_path}/*.txt").files)) == [Document("x.txt", "a\r\nnaïve")]


def test_fingerprint_depends_on_names_and_contents_but_not_on_the_place(corpus_folder: Path, tmp_path: Path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(corpus_folder, copy)
    original = scan(f"{corpus_folder}/**/*.txt").fingerprint
    assert scan(f"{copy}/**/*.txt").fingerprint == original
    monkeypatch.chdir(copy)
    assert scan("**/*.txt").fingerprint == original

    (copy / "a/001.txt").rename(copy / "a/renamed.txt")
    renamed = scan(f"{copy}/**/*.txt").fingerprint
    (copy / "a/003.txt").write_text("other")
    changed = scan(f"{copy}/**/*.txt").fingerprint
    assert len({original, renamed, changed}) == 3


def test_split_is_a_partition_near_the_asked_share():
    train, heldout = split(files(2000), SHARE)
    assert sorted(file.name for file in train + heldout) == sorted(file.name for file in files(2000))
    assert abs(len(heldout) / 2000 - SHARE) < 0.03


def test_split_of_a_file_does_not_change_when_files_are_added():
    few, many = split(files(100), SHARE), split(files(500), SHARE)
    assert set(few[0]) <= set(many[0])
    assert set(few[1]) <= set(many[1])


@pytest.mark.parametrize("share", [1e-9, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_split_leaves_no_side_empty(count: int, share: float):
    train, heldout = split(files(count), share)
    assert train
    assert heldout


def test_one_file_cannot_be_split():
    with pytest.raises(UserError, match=r"has 1 file, but at least 2 are needed.*split -C"):
        split(files(1), SHARE)


def test_glob_that_matches_nothing(tmp_path: Path):
    with pytest.raises(UserError, match=r"matches no file; check the path, or use 'stdlib'"):
        scan(f"{tmp_path}/*.txt")


def test_folder_instead_of_a_glob(tmp_path: Path):
    with pytest.raises(UserError, match=r"matches no file; to read a folder, write '.*/\*\*/\*\.txt'"):
        scan(str(tmp_path))


def test_corpus_without_text(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xff")
    (tmp_path / "b.txt").write_bytes(b"")
    with pytest.raises(UserError, match="has 2 files, all of them empty or not UTF-8"):
        scan(f"{tmp_path}/*.txt")


def test_unreadable_file(tmp_path: Path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)  # file modes do not stop a superuser
    with pytest.raises(UserError, match=r"cannot read .*a\.txt: Permission denied"):
        scan(f"{tmp_path}/*.txt")


def test_file_that_changes_after_the_scan(tmp_path: Path):
    (tmp_path / "a.txt").write_text("before")
    corpus = scan(f"{tmp_path}/*.txt")
    (tmp_path / "a.txt").write_text("after")
    with pytest.raises(UserError, match=r"a\.txt changed while the corpus was being read"):
        list(read_documents(corpus.files))


def test_stdlib_is_the_interpreters_own_source_without_test_suites():
    corpus = scan("stdlib")
    names = {file.name for file in corpus.files}
    assert {"os.py", "json/decoder.py", "asyncio/events.py"} <= names
    assert not any(part in ("test", "tests", "site-packages") for name in names for part in name.split("/"))
    assert corpus.files[0].path.is_relative_to(sysconfig.get_paths()["stdlib"])
    assert sum(os.path.getsize(file.path) for file in corpus.files) > 5_000_000


def test_stdlib_is_held_out_to_about_the_default_share():
    train, heldout = (sum(os.path.getsize(file.path) for file in side) for side in split(scan("stdlib").files, 0.05))
    assert 0.01 < heldout / (train + heldout) < 0.15
