"""Which text files a corpus has, what identifies their content, and which of them are held out of training.

Files are read one at a time, so that a corpus may be larger than memory. Nothing here knows tokens.
"""

import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mhc_jax.errors import UserError

STDLIB = "stdlib"

# Third-party code, caches, and test suites, which many distributions leave out of the library.
_STDLIB_SKIPPED = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3"})


@dataclass(frozen=True)
class File:
    """A text file of a corpus."""

    name: str  # relative to the corpus, with forward slashes: the same wherever the corpus lies
    path: Path
    digest: str  # sha256 of the content, hexadecimal


@dataclass(frozen=True)
class Document:
    """The text of one file."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """The files of a source, in the order of their names."""

    source: str
    files: tuple[File, ...]
    skipped: int  # files left out because they are empty or not UTF-8

    @property
    def fingerprint(self) -> str:
        """sha256 over names and contents, hexadecimal; it does not depend on where the corpus lies."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.name}\0{file.digest}\n".encode())
        return digest.hexdigest()


def scan(source: str) -> Corpus:
    """Finds and hashes the files of a source: "stdlib", or a glob of text files (`**` goes into subfolders).

    Raises:
      UserError: the source has no file with text, or one of its files cannot be read.
    """
    root, paths = _stdlib_paths() if source == STDLIB else _glob_paths(source)
    files = []
    for path in paths:
        content = _read_bytes(path)
        if content and _is_utf8(content):
            files.append(File(path.relative_to(root).as_posix(), path, hashlib.sha256(content).hexdigest()))
    if not files:
        raise UserError(f"data.source {source!r} has {len(paths)} files, all of them empty or not UTF-8; choose files with text")
    return Corpus(source, tuple(sorted(files, key=lambda file: file.name)), skipped=len(paths) - len(files))


def split(files: Sequence[File], heldout_share: float) -> tuple[list[File], list[File]]:
    """Training files and held-out files, in the given order.

    A hash of its name decides where a file goes, so that files added later move none of the others. Only where that leaves one side of a
    tiny corpus empty, the file nearest to the border goes there.

    Raises:
      UserError: there are fewer than two files.
    """
    if len(files) < 2:
        raise UserError(
            f"the corpus has {len(files)} file, but at least 2 are needed, one to train on and one to hold out; "
            "widen data.source or cut the text into several files (`split -C 64k FILE`)"
        )
    ranks = {file.name: _rank(file.name) for file in files}
    lowest, highest = min(ranks.values()), max(ranks.values())
    held = {name for name, rank in ranks.items() if (rank < heldout_share or rank == lowest) and rank < highest}
    return [file for file in files if file.name not in held], [file for file in files if file.name in held]


def read_documents(files: Sequence[File]) -> Iterator[Document]:
    """Reads the files one after the other.

    Raises:
      UserError: a file has changed since it was scanned, or cannot be read.
    """
    for file in files:
        content = _read_bytes(file.path)
        if hashlib.sha256(content).hexdigest() != file.digest:
            raise UserError(f"{file.path} changed while the corpus was being read; try again when it rests")
        yield Document(file.name, content.decode())


def _rank(name: str) -> float:
    """A number in [0, 1) that looks random but depends on the name alone."""
    return int.from_bytes(hashlib.sha256(f"heldout\0{name}".encode()).digest()[:6], "big") / 2**48


def _stdlib_paths() -> tuple[Path, list[Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _STDLIB_SKIPPED]
        paths += [path for name in names if name.endswith(".py") and (path := Path(folder, name)).is_file()]
    if not paths:
        raise UserError(f"this Python has no library source in {root}; set data.source to a glob of text files")
    return root, paths


def _glob_paths(pattern: str) -> tuple[Path, list[Path]]:
    pattern = os.path.expanduser(pattern)
    paths = [path for name in glob.glob(pattern, recursive=True) if (path := Path(name)).is_file()]
    if not paths:
        hint = f"to read a folder, write '{Path(pattern, '**', '*.txt')}'" if Path(pattern).is_dir() else "check the path"
        raise UserError(f"data.source {pattern!r} matches no file; {hint}, or use {STDLIB!r}")
    return _fixed_folder(pattern), list(dict.fromkeys(paths))


def _fixed_folder(pattern: str) -> Path:
    """The folder that a glob pattern names before its first wildcard."""
    folder = Path(pattern).parent
    while any(character in str(folder) for character in "*?["):
        folder = folder.parent
    return folder


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; make it readable or choose a data.source without it") from error


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True
