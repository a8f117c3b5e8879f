"""Tokenises the sources of a config once, each into a cache folder that later calls find again. What is in a folder: prepared."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mhc_jax.config import DataConfig
from mhc_jax.data.corpus import scan
from mhc_jax.data.documents import Documents, bad_records
from mhc_jax.data.prepared import MANIFEST, Prepared, PreparedSource, read_manifest
from mhc_jax.data.tokenizer import TextTokenizer, check_trainable, load_tokenizer, train_tokenizer
from mhc_jax.data.write import write_folder
from mhc_jax.errors import UserError

FORMAT = 2  # raised when the same corpus and settings would give other files

Say = Callable[[str], None]


def cache_root() -> Path:
    """`$MHC_JAX_CACHE`, or ~/.cache/mhc_jax."""
    return Path(os.environ.get("MHC_JAX_CACHE") or "~/.cache/mhc_jax").expanduser()


def prepare(data: DataConfig, vocab_size: int, cache: Path | None = None, progress: Say | None = None) -> Prepared:
    """Tokenises the sources of a config, or finds the results of an earlier call with the same text and settings.

    Every call looks at all files and hashes those that have changed. A cache folder whose files are not those that were written is made
    anew. Several processes may prepare the same corpus at once.

    Args:
      data: the fields source, weights, text_field, max_bad_records, tokenizer and heldout_share are used.
      vocab_size: of the model; token ids are below it.
      cache: folder of cached files, default `cache_root()`.
      progress: receives a line of text at the beginning of each stage.

    Raises:
      UserError: a corpus or the tokenizer does not do (see corpus, documents and tokenizer), or the cache cannot be written.
    """
    say = progress or (lambda line: None)
    root = cache_root() if cache is None else cache
    given = None if data.tokenizer is None else load_tokenizer(Path(data.tokenizer).expanduser(), vocab_size)
    if given is None:
        check_trainable(vocab_size)
    everything = [
        Documents(
            scan(source, root),
            text_field=data.text_field,
            heldout_share=data.heldout_share,
            max_bad_records=data.max_bad_records,
        )
        for source in data.source
    ]
    tokenizer = given or _trained_tokenizer(everything, data, vocab_size, root, say)
    return Prepared(tuple(_prepare_source(documents, tokenizer, data, root, say) for documents in everything), data.weights)


def _trained_tokenizer(everything: Sequence[Documents], data: DataConfig, vocab_size: int, root: Path, say: Say) -> TextTokenizer:
    """A BPE of the training documents of all sources, whatever their weights, trained once."""
    corpora = [documents.corpus.fingerprint for documents in everything]
    folder = root / "tokenizers" / _key(corpora=corpora, split=_split(data), vocab_size=vocab_size)
    kept = folder / "tokenizer.json"
    if kept.exists():
        with contextlib.suppress(UserError):  # damaged: trained again
            return load_tokenizer(kept, vocab_size)
    for documents in everything:
        _ = documents.survey  # what is wrong with the text comes first
    say(f"training a tokenizer of {vocab_size} tokens on {_names(data.source)}")
    tokenizer = train_tokenizer((text for documents in everything for text in documents.training()), vocab_size)
    with _temporary_sibling(folder) as temporary:
        (temporary / "tokenizer.json").write_text(tokenizer.json, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        _rename(temporary, folder, "tokenizer.json")
    return tokenizer


def _prepare_source(documents: Documents, tokenizer: TextTokenizer, data: DataConfig, root: Path, say: Say) -> PreparedSource:
    corpus = documents.corpus
    folder = root / "data" / _key(corpus=corpus.fingerprint, split=_split(data), tokenizer=tokenizer.fingerprint)
    prepared = _intact(folder, say)
    if prepared is not None and bad_records(prepared.skipped_records) > data.max_bad_records:
        _ = documents.survey  # refuses them: the earlier call tolerated more
    if prepared is None:
        survey = documents.survey
        if survey.first_bad:
            counts = ", ".join(f"{count} {kind}" for kind, count in survey.skipped.items())
            say(f"skipping bad records of {corpus.source}: {counts} (the first: {survey.first_bad})")
        with _temporary_sibling(folder) as temporary:
            say(f"tokenising {survey.documents:,} documents of {corpus.source}")
            write_folder(temporary, documents, tokenizer)
            _rename(temporary, folder, MANIFEST)
        prepared = read_manifest(folder)
    say(f"{prepared.train_tokens:,} training and {prepared.heldout_tokens:,} held-out tokens of {corpus.source} in {folder}")
    # A moved corpus is the same corpus: the source is the caller's, not that of the first call.
    return dataclasses.replace(prepared, source=corpus.source)


def _intact(folder: Path, say: Say) -> PreparedSource | None:
    """What an earlier call left in the folder; a damaged folder is moved out of the way."""
    if not folder.exists():
        return None
    try:
        return read_manifest(folder)
    except (OSError, ValueError) as error:
        say(f"{folder} is damaged ({error}); it is made anew")
    # Renamed first: what is being deleted must never be found under the name that promises a whole folder.
    aside = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.tmp")
    try:
        folder.rename(aside)
    except FileNotFoundError:  # another process was faster
        return None
    except OSError as error:
        raise UserError(f"{folder} is damaged and cannot be replaced: {error.strerror}; delete it") from error
    shutil.rmtree(aside, ignore_errors=True)
    return None


def _split(data: DataConfig) -> dict[str, Any]:
    """What decides, beside the corpus, which text is trained on."""
    return {"heldout_share": data.heldout_share, "text_field": data.text_field}


def _key(**settings: Any) -> str:
    return hashlib.sha256(json.dumps({"format": FORMAT, **settings}, sort_keys=True).encode()).hexdigest()[:32]


def _names(sources: Sequence[str]) -> str:
    return " and ".join(sources)


@contextlib.contextmanager
def _temporary_sibling(folder: Path) -> Iterator[Path]:
    """An empty folder beside the given one, to be renamed to it; what is left of it afterwards is deleted."""
    temporary = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder.parent}: {error.strerror}; set MHC_JAX_CACHE to a folder that can be written") from error
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rename(temporary: Path, folder: Path, sign: str) -> None:
    """Puts the finished folder in its place, unless another process was faster: then theirs, which is the same, stays."""
    try:
        temporary.rename(folder)
    except OSError:
        if not (folder / sign).exists():
            raise
