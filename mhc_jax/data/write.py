"""Writes the tokens of a corpus into a folder. Where the folder lies and when it is written is decided by prepare."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from mhc_jax.data.documents import Documents
from mhc_jax.data.prepared import PreparedSource, write_manifest
from mhc_jax.data.tokenizer import TextTokenizer
from mhc_jax.errors import UserError

CHUNK = 1 << 22  # characters of text that are tokenised in one call, in parallel over documents


def write_folder(folder: Path, documents: Documents, tokenizer: TextTokenizer) -> PreparedSource:
    """Fills an empty folder with what PreparedSource describes, reading the corpus once.

    Raises:
      UserError: the tokenizer finds no token in one of the two splits.
    """
    (folder / "tokenizer.json").write_text(tokenizer.json, encoding="utf-8")
    bits = 16 if tokenizer.size <= 1 << 16 else 32
    with contextlib.ExitStack() as stack:
        train, heldout = (stack.enter_context(contextlib.closing(_Split(folder / f"{name}.array_record"))) for name in ("train", "heldout"))
        frequencies = np.zeros(tokenizer.size, np.int64)
        for chunk in _chunks(documents):
            for (text, held), ids in zip(chunk, tokenizer.encode([text for text, _ in chunk])):
                if ids.size:  # a document in which the tokenizer finds nothing gets no record
                    record = np.append(ids, tokenizer.end_of_text)
                    (heldout if held else train).write(record.astype(f"<u{bits // 8}").tobytes(), record.size, len(text.encode()))
                    if held:
                        frequencies += np.bincount(record, minlength=tokenizer.size)
    if not (train.documents and heldout.documents):
        raise UserError(f"the tokenizer finds no token in a whole split of {documents.corpus.source}; choose another data.tokenizer")
    np.save(folder / "heldout_frequencies.npy", frequencies, allow_pickle=False)
    prepared = PreparedSource(
        folder=folder,
        source=documents.corpus.source,
        fingerprint=documents.corpus.fingerprint,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.size,
        end_of_text=tokenizer.end_of_text,
        token_bits=bits,
        train_documents=train.documents,
        heldout_documents=heldout.documents,
        skipped_records=documents.survey.skipped,
        train_tokens=train.tokens,
        heldout_tokens=heldout.tokens,
        heldout_bytes=heldout.bytes,
        sizes={path.name: path.stat().st_size for path in sorted(folder.iterdir())},
    )
    write_manifest(prepared)
    return prepared


class _Split:
    """An ArrayRecord file being written, and what it holds so far."""

    def __init__(self, path: Path):
        self._writer = ArrayRecordWriter(str(path), "group_size:1")  # one record a group: cheap to read in any order
        self.documents = self.tokens = self.bytes = 0

    def write(self, record: bytes, tokens: int, text_bytes: int) -> None:
        self._writer.write(record)
        self.documents += 1
        self.tokens += tokens
        self.bytes += text_bytes

    def close(self) -> None:
        self._writer.close()


def _chunks(documents: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """Groups of consecutive documents with about CHUNK characters."""
    chunk: list[tuple[str, bool]] = []
    length = 0
    for text, held in documents:
        chunk.append((text, held))
        length += len(text)
        if length >= CHUNK:
            yield chunk
            chunk, length = [], 0
    if chunk:
        yield chunk
