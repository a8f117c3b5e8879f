"""Odd corpora: every text that can be read is tokenised and comes back, everything else is counted, and batches are what they must be."""

import gzip
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tokenizers import Tokenizer

from mhc_jax.config import DataConfig
from mhc_jax.data.pipeline import heldout_batches, training_batches
from mhc_jax.data.prepare import prepare
from mhc_jax.data.prepared import Prepared
from mhc_jax.errors import UserError

from .harness import ACCEPTED, REFUSED, Check, Wrong
from .mutate import ODD, damage

NAME, SHARE, SHORT = "corpora", 15, 15

VOCAB, SEQ_LEN = 265, 16
NAMES = ("a", "b c", "流", "x[1]", "-rf", "a'b", 'a"b', "a\nb", "%s", "{}", ".hidden", "*", "?", "~", "CON", "a" * 200)


@dataclass
class Known:
    """What the generator knows about the corpus that it wrote."""

    texts: list[str] = field(default_factory=list)  # that must come back
    bad: int = 0  # records that must be counted as bad
    empty: int = 0  # records that must be left out, though nothing is wrong with them
    exactly: bool = True  # False where a file was damaged at random, so that only its bounds are known
    same_sides: bool = False  # records of one text cannot be split into two sides

    def left_out(self, content: object) -> None:
        """Counts a record that is no document."""
        if content in (b"", ""):
            self.empty += 1
        else:
            self.bad += 1


def case(rng: random.Random, room: Path) -> tuple[str, Check]:
    folder, known = room / "text", Known()
    folder.mkdir()
    format = rng.choice(["txt", "txt", "txt.gz", "jsonl", "jsonl", "jsonl.gz", "parquet", "array_record"])
    files = rng.randint(1, 5) if format.startswith("txt") else rng.randint(1, 2)
    if format.startswith("txt"):
        files += rng.choice([0, 3, 20])
    paths = []
    for index in range(files):
        path = folder / f"{index}{rng.choice(NAMES) if rng.random() < 0.2 else ''}.{format}"
        _WRITE[format.split(".")[0]](rng, path, known)
        paths.append(path)
    known.same_sides = not format.startswith("txt")
    done = f"{files} files of {format}"
    if rng.random() < 0.4:
        path = rng.choice(paths)
        how = rng.choice(["flip", "cut", "empty", "zeros", "garbage", "append"])
        path.write_bytes(damage(rng, path.read_bytes(), how))
        known.exactly = False
        done += f", {ascii(path.name)[:40]}: {how}"
    if rng.random() < 0.3:
        done += f", {_litter(rng, folder, format)}"
    limit = rng.choice([0, 1, 3, 100])
    config = DataConfig(seq_len=SEQ_LEN, source=(f"{folder}/**/*.{format}",), heldout_share=0.3, max_bad_records=limit)
    return f"{done}, {known.bad} bad of {limit} allowed", lambda: _check(config, known, room / "cache")


def _text(rng: random.Random) -> str:
    kind = rng.choice(["words", "words", "words", "short", "unicode", "controls", "long"])
    if kind == "short":
        return rng.choice("ab\n 流")
    if kind == "unicode":
        return "".join(chr(rng.choice([0xFEFF, 0x1F99C, 0x0, 0xE9, 0x202E, 0xFFFD, 0xFFFF, 0x10FFFF, 0x2028, 0x85])) for _ in range(20))
    if kind == "controls":
        return "".join(chr(rng.randrange(32)) for _ in range(rng.randint(1, 50))) + "<|endoftext|>"
    return " ".join(rng.choices(["stream", "of", "the", "流", "naïve", "\n"], k=rng.randint(3, 40))) * (200 if kind == "long" else 1)


def _bad_bytes(rng: random.Random) -> bytes:
    return rng.choice(
        [b"", b"\xff\xfe", b"ok \xed\xa0\x80", "naïve".encode("latin-1"), "流".encode("utf-16"), b"\xc0\x80", b"cut \xe6\xb5"]
    )


def _write_texts(rng: random.Random, path: Path, known: Known) -> None:
    if rng.random() < 0.2:
        content = _bad_bytes(rng)
        known.left_out(content)
    else:
        known.texts.append(_text(rng))
        content = known.texts[-1].encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def _write_json_lines(rng: random.Random, path: Path, known: Known) -> None:
    lines = []
    for index in range(rng.randint(0, 30)):
        kind = rng.random()
        if kind < 0.8:
            known.texts.append(_text(rng))
            lines.append(json.dumps({"text": known.texts[-1], "n": index}, ensure_ascii=rng.random() < 0.5).encode())
        elif kind < 0.9:
            odd = rng.choice([value for value in ODD if not isinstance(value, str) or not value or not value.isprintable()])
            if isinstance(odd, str) and odd and "\ud800" not in odd:
                known.texts.append(odd)
            else:
                known.left_out(odd)
            lines.append(json.dumps({"text": odd}).encode())
        elif kind < 0.95:
            lines.append(rng.choice([b"", b"   ", b"\r"]))  # blank lines are no records
        else:
            lines.append(rng.choice([b"oops", b"{", b"[]", b"3", b'"text"', b"{}", b'{"text": "\xff"}', b"[" * 20_000, b"\0", b'{"text"}']))
            known.bad += 1
    content = b"".join(line + rng.choice([b"\n", b"\r\n"]) for line in lines)
    content = (b"\xef\xbb\xbf" if rng.random() < 0.1 and content else b"") + (
        content if rng.random() < 0.8 else content.removesuffix(b"\n")
    )
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    if not lines or not content.strip(b"\xef\xbb\xbf \r\n"):
        known.exactly = False  # a file without records may count or not


def _rows(rng: random.Random, known: Known, null: bool) -> Iterator[bytes | None]:
    for _ in range(rng.randint(1, 30)):
        kind = rng.random()
        if kind < 0.85:
            known.texts.append(_text(rng))
            yield known.texts[-1].encode()
        else:
            content = None if null and kind < 0.9 else _bad_bytes(rng)
            known.left_out(content)
            yield content


def _write_parquet(rng: random.Random, path: Path, known: Known) -> None:
    column = pa.array(list(_rows(rng, known, null=True)), pa.large_binary())
    pq.write_table(pa.table({"text": column}), path, row_group_size=rng.choice([3, 100]), write_page_checksum=True)


def _write_array_record(rng: random.Random, path: Path, known: Known) -> None:
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for row in _rows(rng, known, null=False):
        writer.write(row)
    writer.close()


_WRITE: dict[str, Any] = {
    "txt": _write_texts,
    "jsonl": _write_json_lines,
    "parquet": _write_parquet,
    "array_record": _write_array_record,
}


def _litter(rng: random.Random, folder: Path, format: str) -> str:
    """What a glob finds although it is no file of text."""
    what = rng.choice(["folder", "broken link", "loop", "other"])
    path = folder / f"zz.{format}"
    if what == "folder":
        path.mkdir()
    elif what == "broken link":
        path.symlink_to("nowhere")
    elif what == "loop":
        path.symlink_to(path)
    else:
        (folder / "other.bin").write_bytes(rng.randbytes(100))
    return what


def _check(config: DataConfig, known: Known, cache: Path) -> str:
    documents, sides = len(known.texts), len(set(known.texts)) if known.same_sides else len(known.texts)
    must_refuse = known.bad > config.max_bad_records or sides < 2
    try:
        prepared = prepare(config, VOCAB, cache)
    except UserError as error:
        if known.exactly and not must_refuse:
            raise Wrong(f"refused, but {documents} documents are good and {known.bad} bad: {error}") from error
        return REFUSED
    if known.exactly and must_refuse:
        raise Wrong(f"accepted with {documents} documents, {known.bad} bad ones and {config.max_bad_records} allowed")
    (source,) = prepared.sources
    found = _decoded(source)
    empty = source.skipped_records.get("empty", 0)
    skipped = sum(source.skipped_records.values()) - empty
    if known.exactly and (found != Counter(known.texts) or (skipped, empty) != (known.bad, known.empty)):
        raise Wrong(f"{found.total()} documents and {skipped} skipped instead of {documents} and {known.bad}, or other texts")
    if skipped > config.max_bad_records:
        raise Wrong(f"{skipped} records were skipped, {config.max_bad_records} allowed")
    _check_batches(prepared)
    return ACCEPTED


def _decoded(source: Any) -> Counter[str]:
    """The texts of the cache, as its own tokenizer spells them."""
    tokenizer = Tokenizer.from_file(str(source.tokenizer))
    texts: Counter[str] = Counter()
    for path in (source.train_records, source.heldout_records):
        reader = ArrayRecordReader(str(path))
        for record in reader.read_all():
            ids = np.frombuffer(record, source.token_dtype)
            if ids[-1] != source.end_of_text or ids.max() >= VOCAB:
                raise Wrong("a document does not end with end-of-text, or holds ids beyond the vocabulary")
            texts[tokenizer.decode(ids[:-1].tolist(), skip_special_tokens=False)] += 1
        reader.close()
    return texts


def _check_batches(prepared: Prepared) -> None:
    try:
        batches = list(training_batches(prepared, seq_len=SEQ_LEN, batch_size=2, seed=0, read_threads=1, repeat=False))
    except UserError:
        if prepared.train_pairs >= SEQ_LEN:
            raise
        batches = []
    else:
        if sum(int((batch["targets"] >= 0).sum()) for batch in batches) != prepared.train_pairs:
            raise Wrong("an epoch does not have the targets that the cache says")
    try:
        batches += heldout_batches(prepared, seq_len=SEQ_LEN, sequences=1, batch_size=1)
    except UserError:
        if prepared.heldout_pairs >= SEQ_LEN:
            raise
    for batch in batches:
        tokens, targets, segments, positions = (batch[name] for name in ("tokens", "targets", "segment_ids", "positions"))
        real, follows = segments > 0, segments[:, 1:] == segments[:, :-1]
        if tokens.min() < 0 or tokens.max() >= VOCAB or targets.min() < -1 or targets.max() >= VOCAB:
            raise Wrong("ids lie outside the vocabulary")
        if not np.array_equal(targets >= 0, real) or np.any(tokens[~real]):
            raise Wrong("targets are not exactly where the text is")
        if np.any((targets[:, :-1] != tokens[:, 1:]) & follows & real[:, 1:]):
            raise Wrong("targets do not follow from tokens")
        if np.any((np.diff(positions, axis=1) != 1) & follows & real[:, 1:]):
            raise Wrong("positions do not count on inside a document")
