"""Paths here and in object stores, told apart on the command line; files that are never half there."""

import importlib.util
from pathlib import Path

import pytest
from etils import epath

from mhc_jax.errors import UserError
from mhc_jax.files import LineFile, is_remote, read_json, to_path, write_atomically


@pytest.mark.parametrize("text", ["s3://bucket/a/b", "gs://bucket/a/b"])
def test_a_path_of_a_store_keeps_its_slashes(text, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    path = to_path(text)
    assert is_remote(path)
    assert str(path / "c") == f"{text}/c"


def test_other_paths_are_of_this_machine():
    assert to_path("runs/x") == Path("runs/x")
    assert not is_remote(to_path("/tmp/x"))
    assert not is_remote(epath.Path("/tmp/x"))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package gcsfs: pip install gcsfs"):
        to_path("gs://bucket/run")


def test_an_unknown_store_is_refused():
    with pytest.raises(UserError, match="no store ftp://; the known ones are gs://, s3://"):
        to_path("ftp://host/run")


def test_lines_are_kept_added_and_there_after_each(tmp_path):
    path = tmp_path / "lines"
    path.write_text("old\n")
    file = LineFile(path, ["first"])
    file.add("second")
    assert path.read_text() == "first\nsecond\n"
    file.flush()
    file.close()


def test_a_file_that_is_not_json_is_named(tmp_path):
    for content in (b"{", b"\xff"):
        write_atomically(tmp_path / "x.json", content)
        with pytest.raises(UserError, match=r"x\.json is half-written"):
            read_json(tmp_path / "x.json")
