"""Files in a bucket, with a local folder in its place."""

import gzip
import json
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils.epath import backend
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from small_corpus import VOCAB, texts, write_array_record

from mhc_jax.config import DataConfig
from mhc_jax.data.corpus import scan
from mhc_jax.data.prepare import prepare
from mhc_jax.errors import UserError

TEXTS = texts(30)


class Bucket(DirFileSystem):
    """s3://NAME is a folder of that name."""

    protocol = "s3"

    def _join(self, path: Any) -> Any:
        return super()._join(self._strip_protocol(path) if isinstance(path, str) else path)


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "store/bucket/corpus"
    folder.mkdir(parents=True)
    store = Bucket(path=str(tmp_path / "store"), fs=LocalFileSystem(), skip_instance_cache=True)
    monkeypatch.setattr(backend.fsspec_backend, "_get_filesystem", lambda name: {"s3": store}[name])
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (folder / "a.jsonl").write_text(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines.replace('"text": "', '"text": "b').encode()))
    pq.write_table(pa.table({"text": ["c" + text for text in TEXTS]}), folder / "c.parquet")
    return folder


def test_a_bucket_is_read_like_a_folder(bucket: Path, tmp_path: Path):
    remote, local = scan("s3://bucket/corpus/*", tmp_path / "cache"), scan(f"{bucket}/*", tmp_path / "cache")
    assert [part.place for part in remote.parts] == [f"s3://bucket/corpus/{name}" for name in ("a.jsonl", "b.jsonl.gz", "c.parquet")]
    assert remote.fingerprint == local.fingerprint
    for ours, theirs in zip(remote.parts, local.parts):
        assert list(ours.records("text")) == list(theirs.records("text"))
    config = DataConfig(seq_len=32, source=("s3://bucket/cor*/*",), heldout_share=0.2)
    prepared = prepare(config, VOCAB, cache=tmp_path / "cache")
    assert prepared.sources[0].train_documents + prepared.sources[0].heldout_documents == 3 * len(TEXTS)


def test_a_store_that_does_not_tell_the_time_is_hashed_every_time(bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    info = Bucket.info
    monkeypatch.setattr(Bucket, "info", lambda self, path, **options: {**info(self, path, **options), "mtime": None})
    first = scan("s3://bucket/corpus/*", tmp_path / "cache").fingerprint
    (bucket / "a.jsonl").write_text((bucket / "a.jsonl").read_text().replace("stream", "STREAM"))  # the same size
    assert scan("s3://bucket/corpus/*", tmp_path / "cache").fingerprint != first


def test_what_a_bucket_cannot_do(bucket: Path, tmp_path: Path):
    with pytest.raises(UserError, match="matches no file; check the address"):
        scan("s3://bucket/corpus/*.txt", tmp_path)
    with pytest.raises(UserError, match=r"'\*\*' would list a whole bucket"):
        scan("s3://bucket/**/*.txt", tmp_path)
    write_array_record(bucket / "d.array_record", [b"one"])
    (part,) = scan("s3://bucket/corpus/*.array_record", tmp_path).parts
    with pytest.raises(UserError, match=r"s3://bucket/corpus/d\.array_record: ArrayRecord files are read from a local disk only"):
        list(part.records("text"))


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def missing(name: str, **options: Any) -> None:
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(UserError, match=r"'gs://bucket/\*\.txt': Please install gcsfs to access Google Storage with pip, or copy"):
        scan("gs://bucket/*.txt", tmp_path)


def test_an_unknown_kind_of_address(tmp_path: Path):
    with pytest.raises(UserError, match=r"ftp://host/\*\.txt': files can be read from a local disk and from gs://, s3://"):
        scan("ftp://host/*.txt", tmp_path)
