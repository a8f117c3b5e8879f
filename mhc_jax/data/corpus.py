"""Which parts a source of text has (files, or a Hugging Face data set), and what identifies their content. Nothing here knows tokens."""

import glob
import hashlib
import os
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mhc_jax.data import huggingface
from mhc_jax.data.digests import Digests, Stamp, stamp_of
from mhc_jax.data.formats import Records, read_file
from mhc_jax.errors import UserError

STDLIB = "stdlib"
REMOTE = ("gs://", "s3://")

# Third-party code, caches, and test suites, which many distributions leave out of the library.
_STDLIB_SKIPPED = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3"})


class Part(Protocol):
    """Something that records are read from."""

    @property
    def name(self) -> str:
        """The same wherever the corpus lies; a document that is a whole file is held out by it."""

    @property
    def place(self) -> str:
        """What a message calls it."""

    @property
    def digest(self) -> str:
        """Identifies the content; hexadecimal."""

    def records(self, text_field: str) -> Records:
        """Its records in their order."""


@dataclass(frozen=True)
class File:
    """A file of a corpus."""

    name: str  # relative to the corpus, with forward slashes
    path: Path
    digest: str  # sha256 of the content
    stamp: Stamp

    @property
    def place(self) -> str:
        return str(self.path)

    def records(self, text_field: str) -> Records:
        """Raises UserError where the file is no longer what was scanned."""
        self._check_unchanged()
        yield from read_file(self.path, text_field)
        self._check_unchanged()

    def _check_unchanged(self) -> None:
        if stamp_of(self.path) != self.stamp:
            raise UserError(f"{self.path} changed while the corpus was being read; try again when it rests")


@dataclass(frozen=True)
class Corpus:
    """The parts of a source, in the order of their names."""

    source: str
    parts: Sequence[Part]

    @property
    def fingerprint(self) -> str:
        """sha256 over names and contents, hexadecimal; it does not depend on where the corpus lies."""
        digest = hashlib.sha256()
        for part in self.parts:
            digest.update(f"{part.name}\0{part.digest}\n".encode())
        return digest.hexdigest()


def scan(source: str, cache: Path) -> Corpus:
    """Finds the files of a source and hashes those that have changed since the last call.

    Args:
      source: "stdlib"; a glob of files, local (`**` goes into subfolders) or remote ("gs://...", "s3://..."); or "hf:NAME" (see
        huggingface).
      cache: the folder of cached files; digests are remembered in it.

    Raises:
      UserError: the source has no file, or one that cannot be read; a package or the network is missing.
    """
    digests = Digests(cache / "digests" / f"{hashlib.sha256(source.encode()).hexdigest()[:32]}.json")
    parts: list[Part]
    if source.startswith(huggingface.PREFIX):
        parts = [huggingface.load(source, lambda path: digests.of(path)[0])]
    else:
        root, paths = _find(source)(source)
        parts = [File(path.relative_to(root).as_posix(), path, *digests.of(path)) for path in paths]
    digests.save()
    return Corpus(source, sorted(parts, key=lambda part: part.name))


def _find(source: str) -> Callable[[str], tuple[Path, list[Path]]]:
    return _stdlib_paths if source == STDLIB else _remote_paths if "://" in source else _local_paths


def _stdlib_paths(source: str) -> tuple[Path, list[Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _STDLIB_SKIPPED]
        paths += [path for name in names if name.endswith(".py") and (path := Path(folder, name)).is_file()]
    if not paths:
        raise UserError(f"this Python has no library source in {root}; set data.source to a glob of text files")
    return root, paths


def _local_paths(pattern: str) -> tuple[Path, list[Path]]:
    pattern = os.path.expanduser(pattern)
    paths = [path for name in glob.glob(pattern, recursive=True) if (path := Path(name)).is_file()]
    if not paths:
        hint = f"to read a folder, write '{Path(pattern, '**', '*.txt')}'" if Path(pattern).is_dir() else "check the path"
        raise UserError(f"data.source {pattern!r} matches no file; {hint}, or use {STDLIB!r}")
    return _fixed_folder(Path(pattern)), list(dict.fromkeys(paths))


def _remote_paths(pattern: str) -> tuple[Path, list[Path]]:
    from etils import epath

    if not pattern.startswith(REMOTE):
        raise UserError(
            f"data.source {pattern!r}: files can be read from a local disk and from {', '.join(REMOTE)}; copy them to one of these"
        )
    if "**" in pattern:
        raise UserError(f"data.source {pattern!r}: '**' would list a whole bucket; name the folder, with '*' for its files")
    try:
        whole = epath.Path(pattern)
        root = _fixed_folder(whole)
        paths = [path for path in root.glob(whole.relative_to(root).as_posix()) if not path.is_dir()]
    except ImportError as error:  # gcsfs, s3fs: the library that speaks to this store
        raise UserError(f"data.source {pattern!r}: {error} with pip, or copy the files to a local disk") from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"data.source {pattern!r} cannot be listed ({error}); check the address, the network and your credentials"
        ) from error
    if not paths:
        raise UserError(f"data.source {pattern!r} matches no file; check the address")
    return root, paths


def _fixed_folder(pattern: Path) -> Path:
    """The folder that a glob pattern names before its first wildcard."""
    folder = pattern.parent
    while any(character in str(folder) for character in "*?["):
        folder = folder.parent
    return folder
