"""What is read from every kind of file, and what is made of damage."""

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_corpus import texts, write_array_record

from mhc_jax.data.formats import BadRecord, Record, read_file
from mhc_jax.errors import UserError

TEXTS = texts(200)


def json_lines(written: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, field: text}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(written)).encode()


def zstd(content: bytes) -> bytes:
    buffer = pa.BufferOutputStream()
    with pa.CompressedOutputStream(buffer, "zstd") as stream:
        stream.write(content)
    return buffer.getvalue().to_pybytes()


def write(folder: Path, name: str, field: str = "text") -> Path:
    path = folder / name
    kind = name.partition(".")[2]
    if kind == "parquet":
        pq.write_table(pa.table({"id": range(len(TEXTS)), field: TEXTS}), path, row_group_size=50)
    elif kind == "arrayrecord":
        write_array_record(path, [text.encode() for text in TEXTS])
    else:
        pack = {"jsonl": bytes, "ndjson": bytes, "jsonl.gz": gzip.compress, "JSONL.zst": zstd}[kind]
        path.write_bytes(pack(json_lines(TEXTS, field)))
    return path


def read(path: Path, field: str = "text") -> list[Record | BadRecord]:
    return list(read_file(path, field))


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.jsonl.gz", "a.JSONL.zst", "a.parquet", "a.arrayrecord"])
def test_every_format_gives_every_text_in_order(tmp_path: Path, name: str):
    assert read(write(tmp_path, name)) == [Record(i, text) for i, text in enumerate(TEXTS, start=1)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_the_field_can_have_another_name(tmp_path: Path, name: str):
    assert len([r for r in read(write(tmp_path, name, field="content"), "content") if isinstance(r, Record)]) == len(TEXTS)


@pytest.mark.parametrize(
    ("name", "pack"), [("a.txt", bytes), ("a", bytes), ("a.json", bytes), ("a.txt.gz", gzip.compress), ("a.zst", zstd)]
)
def test_any_other_file_is_one_document(tmp_path: Path, name: str, pack):
    (tmp_path / name).write_bytes(pack("two\r\nlines 流".encode()))
    assert read(tmp_path / name) == [Record(0, "two\r\nlines 流")]


@pytest.mark.parametrize(
    ("line", "kind", "detail"),
    [
        (b"text", "not JSON", "is not JSON"),
        (b'{"text": "x"', "not JSON", "is not JSON"),
        (b"[" * 100_000, "not JSON", "is not JSON"),
        (b'["x"]', "no text", "is a list, not a JSON object"),
        (b'{"id": 1, "txt": "x"}', "no text", "has no field 'text' (its fields: id, txt; data.text_field says which holds the text)"),
        (b'{"text": null}', "no text", "holds null where the text of field 'text' should be"),
        (b'{"text": ["x"]}', "no text", "holds a list where"),
        (b'{"text": ""}', "empty", "is empty"),
        (b'{"text": "na\xefve"}', "not UTF-8", "is not UTF-8 (byte 12)"),
        (b'{"text": "\\ud800"}', "not UTF-8", "half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_named_and_the_next_one_read(tmp_path: Path, line: bytes, kind: str, detail: str):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n' + line + b'\n{"text": "three"}')
    first, bad, last = read(tmp_path / "a.jsonl")
    assert (first, last) == (Record(1, "one"), Record(3, "three"))
    assert isinstance(bad, BadRecord)
    assert (bad.number, bad.kind, bad.count) == (2, kind, 1)
    assert detail in bad.detail


def test_blank_lines_and_a_byte_order_mark_are_no_records(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n  \n{"text": "four"}\n\n')
    assert read(tmp_path / "a.jsonl") == [Record(1, "one"), Record(4, "four")]


@pytest.mark.parametrize("content", [b"", b"\xff\xff"])
def test_bad_text_file(tmp_path: Path, content: bytes):
    (tmp_path / "a.txt").write_bytes(content)
    (bad,) = read(tmp_path / "a.txt")
    assert isinstance(bad, BadRecord)
    assert (bad.number, bad.kind) == (0, "not UTF-8" if content else "empty")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.JSONL.zst", "a.parquet", "a.arrayrecord"])
def test_a_truncated_file_gives_what_comes_before_and_one_bad_record(tmp_path: Path, name: str):
    content = write(tmp_path, name).read_bytes()
    rng = random.Random(0)
    for size in [1, len(content) - 1, *(rng.randrange(2, len(content) - 1) for _ in range(8))]:
        path = tmp_path / f"cut{size}.{name.partition('.')[2]}"
        path.write_bytes(content[:size])
        *before, last = read(path)
        if not (isinstance(last, Record) and last.text == TEXTS[-1]):  # the last line without its line break is whole
            assert isinstance(last, BadRecord), size
            assert last.kind in ("damaged", "not JSON")
        assert before == [Record(i, text) for i, text in enumerate(TEXTS[: len(before)], start=1)]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.JSONL.zst", "a.parquet", "a.arrayrecord"])
def test_a_damaged_file_never_gives_a_wrong_number_of_records_in_silence(tmp_path: Path, name: str):
    path = write(tmp_path, name)
    original, content = read(path), path.read_bytes()
    rng = random.Random(0)
    noticed = 0
    for _ in range(12):
        start = rng.randrange(len(content))
        path.write_bytes(content[:start] + rng.randbytes(40) + content[start + 40 :])
        found = read(path)
        good = [r for r in found if isinstance(r, Record)]
        noticed += len(found) > len(good)
        assert len(good) == len(TEXTS) or len(found) > len(good)
        if name == "a.arrayrecord":  # where every record has a hash
            assert set(good) <= set(original)
    assert noticed


def test_a_damaged_array_record_loses_one_record_only(tmp_path: Path):
    path = write(tmp_path, "a.arrayrecord")
    content = bytearray(path.read_bytes())
    content[4000] ^= 255
    path.write_bytes(content)
    found = read(path)
    (bad,) = [r for r in found if isinstance(r, BadRecord)]
    assert [r for r in found if isinstance(r, Record)] == [Record(i, t) for i, t in enumerate(TEXTS, start=1) if i != bad.number]


def test_a_damaged_row_group_is_counted_with_all_its_rows(tmp_path: Path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": TEXTS}), path, row_group_size=50, write_page_checksum=True, use_dictionary=False)
    page = pq.ParquetFile(path).metadata.row_group(2).column(0)
    place = page.data_page_offset + page.total_compressed_size // 2
    content = bytearray(path.read_bytes())
    content[place : place + 40] = bytes(40)
    path.write_bytes(content)
    found = read(path)
    (bad,) = [r for r in found if isinstance(r, BadRecord)]
    assert (bad.number, bad.count) == (101, 50)
    assert [r for r in found if isinstance(r, Record)] == [Record(i, t) for i, t in enumerate(TEXTS, start=1) if not 100 < i <= 150]


def test_bad_parquet_rows(tmp_path: Path):
    column = pa.array([b"one", None, b"", b"\xff", b"five"], pa.binary())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet")
    assert [(r.number, r.kind) for r in found if isinstance(r, BadRecord)] == [(2, "no text"), (3, "empty"), (4, "not UTF-8")]
    assert [r for r in found if isinstance(r, Record)] == [Record(1, "one"), Record(5, "five")]


def test_parquet_text_may_be_dictionary_encoded(tmp_path: Path):
    pq.write_table(pa.table({"text": pa.array(["x", "y", "x"]).dictionary_encode()}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [Record(1, "x"), Record(2, "y"), Record(3, "x")]


def test_bad_array_records(tmp_path: Path):
    write_array_record(tmp_path / "a.array_record", [b"one", b"", b"\xff"])
    assert [r.kind if isinstance(r, BadRecord) else r.text for r in read(tmp_path / "a.array_record")] == ["one", "empty", "not UTF-8"]


def test_columns_that_do_not_do(tmp_path: Path):
    pq.write_table(pa.table({"content": ["x"], "n": [1], "list": [["x"]]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet has no column 'text'; set data\.text_field to one of content, n, list"):
        read(tmp_path / "a.parquet")
    for field in ("n", "list"):
        with pytest.raises(UserError, match=rf"column '{field}' holds .*, not text; set data\.text_field"):
            read(tmp_path / "a.parquet", field)


def test_parquet_within_gzip_is_refused(tmp_path: Path):
    (tmp_path / "a.parquet.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"unpack the \.gz around it"):
        read(tmp_path / "a.parquet.gz")


def test_a_file_that_cannot_be_opened(tmp_path: Path):
    with pytest.raises(UserError, match=r"cannot read .*a\.jsonl: No such file"):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.zst"])
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch, name: str):
    (tmp_path / name).write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"needs the package pyarrow; pip install 'mhc-jax\[data\]'"):
        read(tmp_path / name)


def test_optional_packages_are_imported_only_where_they_are_used():
    program = (
        "import sys, mhc_jax.cli, mhc_jax.data.pipeline, mhc_jax.data.prepare\n"
        "assert not {'pyarrow', 'datasets', 's3fs', 'gcsfs'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
