"""Tokenises a corpus once, into a cache folder that later calls find again. What is in the folder is described in prepared."""

import dataclasses
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Int64

from mhc_jax.config import DataConfig
from mhc_jax.data.corpus import Corpus, Document, File, read_documents, scan, split
from mhc_jax.data.prepared import MANIFEST, Prepared, read_manifest, write_manifest
from mhc_jax.data.tokenizer import TextTokenizer, check_trainable, load_tokenizer, train_tokenizer
from mhc_jax.errors import UserError

FORMAT = 1  # raised when the same corpus and settings would give other files
CHUNK = 1 << 22  # characters of text that are tokenised in one call, in parallel over documents


def cache_root() -> Path:
    """`$MHC_JAX_CACHE`, or ~/.cache/mhc_jax."""
    return Path(os.environ.get("MHC_JAX_CACHE") or "~/.cache/mhc_jax").expanduser()


def prepare(data: DataConfig, vocab_size: int, cache: Path | None = None, progress: Callable[[str], None] | None = None) -> Prepared:
    """Tokenises the corpus of a config, or finds the result of an earlier call with the same text and settings.

    Every call hashes the corpus, so a changed file is noticed. Several processes may prepare the same corpus at once.

    Args:
      data: the fields source, tokenizer and heldout_share are used.
      vocab_size: of the model; token ids are below it.
      cache: folder of cached files, default `cache_root()`.
      progress: receives a line of text at the beginning of each stage.

    Raises:
      UserError: the corpus or the tokenizer does not do (see corpus and tokenizer), or the cache cannot be written.
    """
    say = progress or (lambda line: None)
    given = None if data.tokenizer is None else load_tokenizer(Path(data.tokenizer).expanduser(), vocab_size)
    if given is None:
        check_trainable(vocab_size)
    corpus = scan(data.source)
    train_files, heldout_files = split(corpus.files, data.heldout_share)

    settings = {
        "format": FORMAT,
        "corpus": corpus.fingerprint,
        "heldout_share": data.heldout_share,
        "tokenizer": f"BPE of {vocab_size}" if given is None else given.fingerprint,
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
    folder = (cache_root() if cache is None else cache) / "data" / key
    if not (folder / MANIFEST).exists():
        temporary = _temporary_sibling(folder)
        try:
            if given is None:
                say(f"training a tokenizer of {vocab_size} tokens on {len(train_files)} files of {data.source}")
            tokenizer = given or train_tokenizer((document.text for document in read_documents(train_files)), vocab_size)
            say(f"tokenising {len(corpus.files)} files of {data.source}")
            _write_folder(temporary, corpus, train_files, heldout_files, tokenizer)
            _rename(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    # A moved corpus is the same corpus: the source is the caller's, not that of the first call.
    prepared = dataclasses.replace(read_manifest(folder), source=data.source)
    say(f"{prepared.train_tokens:,} training and {prepared.heldout_tokens:,} held-out tokens of {data.source} in {folder}")
    return prepared


def unigram_entropy(frequencies: Int64[np.ndarray, " vocab"]) -> float:
    """Entropy in nats of tokens that occur so many times each."""
    seen = frequencies[frequencies > 0]
    share = seen / seen.sum()
    return float(-(share * np.log(share)).sum())


def _write_folder(folder: Path, corpus: Corpus, train_files: list[File], heldout_files: list[File], tokenizer: TextTokenizer) -> None:
    (folder / "tokenizer.json").write_text(tokenizer.json, encoding="utf-8")
    bits = 16 if tokenizer.size <= 1 << 16 else 32
    train = _write_records(folder / "train.array_record", train_files, tokenizer, bits)
    heldout = _write_records(folder / "heldout.array_record", heldout_files, tokenizer, bits)
    prepared = Prepared(
        folder=folder,
        source=corpus.source,
        fingerprint=corpus.fingerprint,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.size,
        end_of_text=tokenizer.end_of_text,
        token_bits=bits,
        train_documents=train.documents,
        heldout_documents=heldout.documents,
        skipped_files=corpus.skipped,
        train_tokens=train.tokens,
        heldout_tokens=heldout.tokens,
        heldout_unigram_entropy=unigram_entropy(heldout.frequencies),
        bytes_per_token=heldout.bytes / heldout.tokens,
    )
    write_manifest(prepared)


@dataclass(frozen=True)
class _Written:
    documents: int
    bytes: int  # UTF-8 bytes of their text
    frequencies: Int64[np.ndarray, " vocab"]  # of token ids, end-of-text included

    @property
    def tokens(self) -> int:
        return int(self.frequencies.sum())


def _write_records(path: Path, files: list[File], tokenizer: TextTokenizer, bits: int) -> _Written:
    """One record a document; a document in which the tokenizer finds nothing gets none."""
    documents, size = 0, 0
    frequencies = np.zeros(tokenizer.size, np.int64)
    writer = ArrayRecordWriter(str(path), "group_size:1")  # one record a group: cheap to read in any order
    try:
        for chunk in _chunks(read_documents(files)):
            size += sum(len(document.text.encode()) for document in chunk)
            for ids in tokenizer.encode([document.text for document in chunk]):
                if ids.size:
                    record = np.append(ids, tokenizer.end_of_text)
                    writer.write(record.astype(f"<u{bits // 8}").tobytes())
                    frequencies += np.bincount(record, minlength=tokenizer.size)
                    documents += 1
    finally:
        writer.close()
    if not documents:
        raise UserError(f"the tokenizer finds no token in {files[0].path} and {len(files) - 1} more files; choose another data.tokenizer")
    return _Written(documents, size, frequencies)


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Groups of consecutive documents with about CHUNK characters."""
    chunk: list[Document] = []
    length = 0
    for document in documents:
        chunk.append(document)
        length += len(document.text)
        if length >= CHUNK:
            yield chunk
            chunk, length = [], 0
    if chunk:
        yield chunk


def _temporary_sibling(folder: Path) -> Path:
    temporary = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder.parent}: {error.strerror}; set MHC_JAX_CACHE to a folder that can be written") from error
    return temporary


def _rename(temporary: Path, folder: Path) -> None:
    """Puts the finished folder in its place, unless another process was faster: then theirs, which is the same, stays."""
    try:
        temporary.rename(folder)
    except OSError:
        if not (folder / MANIFEST).exists():
            raise
