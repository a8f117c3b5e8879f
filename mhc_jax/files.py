"""Reading and writing files so that a reader never meets half of one, here or in an object store. What is in them is decided elsewhere."""

import errno
import importlib.util
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

import fsspec
from etils import epath

from mhc_jax.errors import UserError

AnyPath: TypeAlias = Path | epath.Path  # of this machine, or of an object store; see `to_path`

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


STORES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}  # the package that reaches a store, and its name there


def to_path(text: str) -> AnyPath:
    """The path of a folder of this machine, or of an object store: gs://bucket/folder or s3://bucket/folder.

    Raises:
      UserError: the store is of another kind, or the package that reaches it is not installed.
    """
    scheme, separator, _ = text.partition("://")
    if not separator:
        return Path(text)
    if scheme not in STORES:
        raise UserError(f"{text}: there is no store {scheme}://; the known ones are {', '.join(f'{name}://' for name in STORES)}")
    package, protocol = STORES[scheme]
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{text} needs the package {package}: pip install {package}")
    # Checkpoints are written past this package, whose memory of what is in a folder would be out of date.
    fsspec.config.conf.setdefault(protocol, {})["use_listings_cache"] = False
    return epath.Path(text)


def is_remote(path: AnyPath) -> bool:
    """Whether the path lies in an object store, where nothing can be appended and no folder renamed."""
    return "://" in os.fspath(path)


def write_atomically(path: AnyPath, content: str | bytes) -> None:
    """Replaces the file, so that `path` always holds either the old or the new content, also after a power cut."""
    data = content.encode() if isinstance(content, str) else content
    if is_remote(path):
        path.write_bytes(data)  # an object appears when all of it has arrived
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)  # on a full disk, half a file takes space from the next attempt
        raise
    os.replace(temporary, path)


def write_json(path: AnyPath, data: Any) -> None:
    """Writes strict JSON (no NaN, which only some readers accept) with two spaces of indentation, atomically."""
    write_atomically(path, json.dumps(data, indent=2, allow_nan=False) + "\n")


def read_json(path: AnyPath) -> Any:
    """Reads a JSON file.

    Raises:
      UserError: the file is missing or half-written; the message names it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; delete its folder to run it again") from None
    except (ValueError, RecursionError) as error:  # not JSON, or not text, or nested without end
        raise UserError(f"{path} is half-written ({error}); delete its folder to run it again") from error


class LineFile:
    """A text file that grows by lines. In an object store, where nothing can be appended, `flush` writes all of it again."""

    def __init__(self, path: AnyPath, lines: Iterable[str] = ()):
        """Begins the file anew with the given lines."""
        self._path, self._lines = path, list(lines)
        write_atomically(path, "".join(f"{line}\n" for line in self._lines))
        self._file = None if is_remote(path) else path.open("a", encoding="utf-8")

    def add(self, line: str) -> None:
        """Adds a line. A killed process does not lose it; a killed machine may, until `flush`."""
        if self._file is None:
            self._lines.append(line)
        else:
            self._file.write(f"{line}\n")
            self._file.flush()

    def flush(self) -> None:
        """Returns when all lines are stored for good."""
        if self._file is None:
            write_atomically(self._path, "".join(f"{line}\n" for line in self._lines))
        else:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Stores all lines and closes the file."""
        if self._file is None:
            self.flush()
        else:
            self._file.close()


def disk_is_full(error: BaseException) -> bool:
    """Whether the error, or one that led to it, says that there is no space: disk full, over quota, or a file larger than allowed."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in FULL:
            return True
        seen = seen.__cause__ or seen.__context__
    return False
