"""Records of one file: plain text, JSON lines, Parquet or ArrayRecord, by its suffix. Which files there are is decided elsewhere (corpus).

A file is read once from its beginning to its end, a piece at a time, so that it may be larger than memory. What cannot be read becomes a
`BadRecord`; whether that is tolerated is decided elsewhere (documents).
"""

import codecs
import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader

from mhc_jax.errors import UserError

ROWS = 1024  # of Parquet and ArrayRecord files, read at a time

EMPTY = "empty"  # kind of a record that is left out although nothing is wrong with it


@dataclass(frozen=True)
class Record:
    """The text of one document."""

    number: int  # in its file, from 1 (the line number in JSON lines); 0 where the whole file is the document
    text: str


@dataclass(frozen=True)
class BadRecord:
    """A place where no document could be read."""

    number: int  # as in Record; 0 means the file as a whole
    kind: str  # what they are counted by: EMPTY, not UTF-8, not JSON, no text, damaged
    detail: str  # what is wrong, as the predicate of a sentence
    count: int = 1  # records that are lost


Records = Iterator[Record | BadRecord]


def read_file(path: Path, text_field: str) -> Records:
    """The records of a file in their order.

    Args:
      path: of a local file, or an etils path of a remote one.
      text_field: the field of a JSON line or the column of a Parquet file that holds the document.

    Raises:
      UserError: the file cannot be opened; its format needs a package that is missing; a Parquet file has no such column of text.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packing = suffixes.pop() if suffixes and suffixes[-1] in _UNPACK else None
    suffix = suffixes[-1] if suffixes else ""
    if packing and suffix in (".parquet", *_ARRAY_RECORD):
        raise UserError(f"{path}: {suffix} files are compressed inside; unpack the {packing} around it")
    if suffix in _ARRAY_RECORD:
        yield from _array_record(path)
        return
    read = _JSON_LINES_OR_PARQUET.get(suffix, _whole)
    with contextlib.ExitStack() as stack:
        try:
            stream = stack.enter_context(path.open("rb"))
            if packing:
                stream = stack.enter_context(_UNPACK[packing](stream))
        except OSError as error:
            raise cannot_read(path, error) from error
        yield from read(path, stream, text_field)


def cannot_read(path: Path, error: OSError) -> UserError:
    """What to tell where the operating system refuses a file."""
    return UserError(f"cannot read {path}: {error.strerror or error}; make it readable or choose a data.source without it")


def optional(package: str, purpose: str) -> UserError:
    """What to tell where a package of the extra `data` is missing."""
    return UserError(f"{purpose} needs the package {package}; pip install 'mhc-jax[data]'")


def checked(number: int, text: Any, what: str = "the text") -> Record | BadRecord:
    """The record of a value that should be text."""
    if not isinstance(text, str):
        return BadRecord(number, "no text", f"holds {_kind(text)} where {what} should be")
    if not text:
        return BadRecord(number, EMPTY, "is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        return BadRecord(number, "not UTF-8", "holds half of a surrogate pair, which is no character")
    return Record(number, text)


def _decoded(number: int, content: bytes) -> Record | BadRecord:
    if not content:
        return BadRecord(number, EMPTY, "is empty")
    try:
        return Record(number, content.decode())
    except UnicodeDecodeError as error:
        return BadRecord(number, "not UTF-8", f"is not UTF-8 (byte {error.start})")


def _whole(path: Path, stream: Any, text_field: str) -> Records:
    try:
        content = stream.read()
    except (EOFError, zlib.error, OSError) as error:
        yield _broken_off(path, 0, error)
    else:
        yield _decoded(0, content)


def _json_lines(path: Path, stream: Any, text_field: str) -> Records:
    number = 0
    while True:
        try:
            line = stream.readline()
        except (EOFError, zlib.error, OSError) as error:
            yield _broken_off(path, number + 1, error)
            return
        if not line:
            return
        number += 1
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.isspace():
            yield _from_json(number, line, text_field)


def _from_json(number: int, line: bytes, text_field: str) -> Record | BadRecord:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return BadRecord(number, "not UTF-8", f"is not UTF-8 (byte {error.start})")
    except (ValueError, RecursionError) as error:
        return BadRecord(number, "not JSON", f"is not JSON ({error})")
    if not isinstance(value, dict):
        return BadRecord(number, "no text", f"is {_kind(value)}, not a JSON object")
    if text_field not in value:
        names = ", ".join(sorted(value)[:8]) or "none"
        return BadRecord(number, "no text", f"has no field {text_field!r} (its fields: {names}; data.text_field says which holds the text)")
    return checked(number, value[text_field], f"the text of field {text_field!r}")


def _parquet(path: Path, stream: Any, text_field: str) -> Records:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise optional("pyarrow", f"reading {path}") from error
    try:
        file = pq.ParquetFile(stream, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        yield _broken_off(path, 0, error)
        return
    if text_field not in file.schema_arrow.names:
        raise UserError(f"{path} has no column {text_field!r}; set data.text_field to one of {', '.join(file.schema_arrow.names)}")
    number = 0
    for group in range(file.num_row_groups):
        end = number + file.metadata.row_group(group).num_rows
        try:
            for batch in file.iter_batches(ROWS, row_groups=[group], columns=[text_field]):
                for value in _utf8(path, batch.column(0), text_field):
                    number += 1
                    yield BadRecord(number, "no text", "is null") if value is None else _decoded(number, value)
        except (pa.ArrowException, OSError) as error:
            _check_readable(path, error)
            yield BadRecord(number + 1, "damaged", f"cannot be read, nor the rest of row group {group} ({error})", count=end - number)
        number = end


def _utf8(path: Path, column: Any, text_field: str) -> list[bytes | None]:
    """The bytes of a column of text, not yet checked to be UTF-8."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        return column.cast(pa.large_binary()).to_pylist()
    except (pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
        raise UserError(f"{path}: column {text_field!r} holds {column.type}, not text; set data.text_field to a column of text") from error


def _array_record(path: Path) -> Records:
    if "://" in str(path):
        raise UserError(f"{path}: ArrayRecord files are read from a local disk only; copy it there, or use JSON lines or Parquet")
    try:
        reader = ArrayRecordReader(str(path))
        count = reader.num_records()
        intact = reader.ok()
    except RuntimeError as error:
        yield BadRecord(0, "damaged", f"is not a complete ArrayRecord file ({error})")
        return
    if not intact:
        yield BadRecord(0, "damaged", "is not a complete ArrayRecord file")
        return
    with contextlib.closing(reader):
        for start in range(0, count, ROWS):
            numbers = range(start, min(start + ROWS, count))
            try:
                contents = reader.read(numbers.start, numbers.stop)
            except RuntimeError:  # one of them is damaged: which?
                for i in numbers:
                    try:
                        (content,) = reader.read([i])
                    except RuntimeError as error:
                        yield BadRecord(i + 1, "damaged", f"cannot be read ({error})")
                    else:
                        yield _decoded(i + 1, content)
            else:
                for i, content in zip(numbers, contents):
                    yield _decoded(i + 1, content)


def _unpack_zstd(stream: Any) -> Any:
    try:
        import pyarrow as pa
    except ImportError as error:
        raise optional("pyarrow", "unpacking a .zst file") from error
    return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), "zstd"))


def _broken_off(path: Path, number: int, error: Exception) -> BadRecord:
    _check_readable(path, error)
    return BadRecord(number, "damaged", f"breaks off or is damaged, so that nothing after it can be read ({error})")


def _check_readable(path: Path, error: Exception) -> None:
    """Raises UserError where it was the operating system that failed, and not the content of the file."""
    if isinstance(error, OSError) and error.errno is not None:
        raise cannot_read(path, error) from error


def _kind(value: Any) -> str:
    names = {
        type(None): "null",
        bool: "a truth value",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
        str: "a string",
    }
    return names.get(type(value), f"a {type(value).__name__}")


_ARRAY_RECORD = (".array_record", ".arrayrecord")
_UNPACK: dict[str, Callable[[Any], Any]] = {".gz": lambda stream: gzip.GzipFile(fileobj=stream), ".zst": _unpack_zstd}
_JSON_LINES_OR_PARQUET = {".jsonl": _json_lines, ".ndjson": _json_lines, ".parquet": _parquet}
