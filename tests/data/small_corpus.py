"""Makes the text that the tests of this folder read."""

import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordWriter

from mhc_jax.config import DataConfig
from mhc_jax.data.corpus import scan
from mhc_jax.data.documents import Documents

VOCAB = 300
WORDS = ["stream", "residual", "mixing", "doubly", "stochastic", "naïve", "流", "the", "of", "and", "\n", "    return x"]


def write_corpus(folder: Path, documents: int = 60, seed: int = 0) -> Path:
    """Files of 1 to about 2000 characters, no two alike, in two folders; one more is empty and one is not UTF-8."""
    rng = random.Random(seed)
    for i in range(documents):
        path = folder / ("a" if i % 2 else "b/c") / f"{i:03}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        length = 0 if i == 0 else rng.choice([1, 5, 50, 300])
        path.write_text(" ".join([f"{i}", *rng.choices(WORDS, k=length)]), encoding="utf-8")
    (folder / "a" / "empty.txt").write_text("")
    (folder / "a" / "latin.txt").write_bytes("naïve".encode("latin-1"))
    return folder


def texts(count: int, seed: int = 0, words: Sequence[str] = WORDS) -> list[str]:
    """Documents of 1 to about 300 words, no two alike."""
    rng = random.Random(seed)
    return [" ".join([f"{seed}-{i}", *rng.choices(words, k=rng.choice([1, 5, 50, 300]))]) for i in range(count)]


def write_array_record(path: Path, records: Iterable[bytes]) -> Path:
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return path


def data_config(folder: Path, **changes) -> DataConfig:
    return DataConfig(**{"seq_len": 32, "source": (f"{folder}/**/*.txt",), "heldout_share": 0.2, **changes})


def documents(source: str, cache: Path, *, text_field: str = "text", heldout_share: float = 0.2, max_bad_records: int = 0) -> Documents:
    return Documents(scan(source, cache), text_field=text_field, heldout_share=heldout_share, max_bad_records=max_bad_records)
