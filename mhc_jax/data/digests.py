"""sha256 of files, remembered by size and time of change: a large corpus is hashed once, not at every start."""

import contextlib
import hashlib
import json
import os
import time
import uuid
from pathlib import Path
from typing import Any

from mhc_jax.data.formats import cannot_read

RESTED = 2.0  # seconds; a file changed more recently could change again within the resolution of its file system's clock
BLOCK = 1 << 22  # bytes hashed at a time

Stamp = tuple[int, int]  # size in bytes, time of change in nanoseconds


class Digests:
    """Digests of the files of one source, kept in a JSON file. Losing that file costs time and nothing else."""

    def __init__(self, memory: Path):
        self._memory = memory
        self._known = _read(memory)
        self._used: dict[str, list[Any]] = {}

    def of(self, path: Path) -> tuple[str, Stamp]:
        """The sha256 of the file's content, hexadecimal, and its size and time of change at that moment.

        Raises:
          UserError: the file cannot be read.
        """
        key = os.path.abspath(path) if "://" not in str(path) else str(path)
        size, changed = stamp = stamp_of(path)
        known = self._known.get(key)
        if known is not None and known[:2] == [size, changed]:
            digest = known[2]
        else:
            digest = _sha256(path)
        if changed and time.time() - changed / 1e9 > RESTED:  # some stores do not tell when a file was changed
            self._used[key] = [size, changed, digest]
        return digest, stamp

    def save(self) -> None:
        """Keeps what was asked for since the beginning, and forgets the rest."""
        if self._used == self._known:
            return
        temporary = self._memory.with_name(f"{self._memory.name}.{uuid.uuid4().hex}.tmp")  # others may be writing too
        try:
            self._memory.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self._used))
            temporary.replace(self._memory)
        except OSError:  # a cache that can only be read serves all the same
            with contextlib.suppress(OSError):
                temporary.unlink()


def stamp_of(path: Path) -> Stamp:
    """Size and time of change of a local or remote file.

    Raises:
      UserError: there is no such file, or it is out of reach.
    """
    try:
        stat: Any = path.stat()
    except OSError as error:
        raise cannot_read(path, error) from error
    if hasattr(stat, "st_size"):
        return stat.st_size, stat.st_mtime_ns
    return stat.length, int(stat.mtime * 1_000_000_000)  # etils


def _read(memory: Path) -> dict[str, list[Any]]:
    try:
        known = json.loads(memory.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {key: value for key, value in known.items() if isinstance(value, list) and [type(x) for x in value] == [int, int, str]}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while block := stream.read(BLOCK):
                digest.update(block)
    except OSError as error:
        raise cannot_read(path, error) from error
    return digest.hexdigest()
