"""What tokenised text is there for a run, and how much of it a run has used. Making it is the job of prepare."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class PreparedSource:
    """One tokenised source: train.array_record, heldout.array_record, heldout_frequencies.npy, tokenizer.json and manifest.json.

    A record is one document: its token ids followed by end-of-text, little-endian unsigned integers of `token_bits` bits.
    heldout_frequencies.npy counts how often each token id occurs in the held-out text.
    """

    folder: Path
    source: str  # an element of data.source
    fingerprint: str  # of the corpus
    tokenizer_fingerprint: str
    vocab_size: int  # of the tokenizer; the model's may be larger
    end_of_text: int  # token id
    token_bits: int  # 16 or 32
    train_documents: int
    heldout_documents: int
    skipped_records: dict[str, int]  # records that were left out, by what is wrong with them; empty ones too
    train_tokens: int  # end-of-text included
    heldout_tokens: int  # end-of-text included
    heldout_bytes: int  # UTF-8, of the held-out text
    sizes: dict[str, int]  # bytes of the other files in the folder

    @property
    def train_records(self) -> Path:
        return self.folder / "train.array_record"

    @property
    def heldout_records(self) -> Path:
        return self.folder / "heldout.array_record"

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer.json"

    @property
    def heldout_frequencies(self) -> Float64[np.ndarray, " vocab"]:
        return np.load(self.folder / "heldout_frequencies.npy", allow_pickle=False).astype(np.float64)

    @property
    def token_dtype(self) -> str:
        """NumPy's name of a record's type."""
        return f"<u{self.token_bits // 8}"

    @property
    def train_pairs(self) -> int:
        """Pairs of a token and the next one in the same document: what one epoch trains on."""
        return self.train_tokens - self.train_documents

    @property
    def heldout_pairs(self) -> int:
        """Pairs of a token and the next one in the same document."""
        return self.heldout_tokens - self.heldout_documents


@dataclass(frozen=True)
class Prepared:
    """The tokenised sources of a run, made with one tokenizer, and in which shares they are mixed."""

    sources: tuple[PreparedSource, ...]
    weights: tuple[float, ...] = ()  # relative shares of the training tokens; none: in proportion to the sizes

    @property
    def shares(self) -> tuple[float, ...]:
        """Of the training tokens, from each source; they sum to 1."""
        parts: Sequence[float] = self.weights or [source.train_pairs for source in self.sources]
        return tuple(part / sum(parts) for part in parts)

    @property
    def fingerprint(self) -> str:
        """Of the text and its shares; that of the corpus where there is one source."""
        if len(self.sources) == 1:
            return self.sources[0].fingerprint
        content = json.dumps([[source.fingerprint for source in self.sources], self.shares if self.weights else None])
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def tokenizer_fingerprint(self) -> str:
        return self.sources[0].tokenizer_fingerprint

    @property
    def vocab_size(self) -> int:
        """Of the tokenizer; the model's may be larger."""
        return self.sources[0].vocab_size

    @property
    def end_of_text(self) -> int:
        return self.sources[0].end_of_text

    @property
    def train_documents(self) -> int:
        return sum(source.train_documents for source in self.sources)

    @property
    def train_tokens(self) -> int:
        return sum(source.train_tokens for source in self.sources)

    @property
    def heldout_tokens(self) -> int:
        return sum(source.heldout_tokens for source in self.sources)

    @property
    def train_pairs(self) -> int:
        return sum(source.train_pairs for source in self.sources)

    @property
    def heldout_pairs(self) -> int:
        return sum(source.heldout_pairs for source in self.sources)

    @property
    def heldout_unigram_entropy(self) -> float:
        """Nats a token of the held-out mixture, under its own frequencies."""
        return unigram_entropy(sum(scale * source.heldout_frequencies for scale, source in zip(self._heldout_scales(), self.sources)))

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of the held-out mixture over its tokens; converts nats a token to bits a byte."""
        scales = self._heldout_scales()
        size = sum(scale * source.heldout_bytes for scale, source in zip(scales, self.sources))
        return size / sum(scale * source.heldout_tokens for scale, source in zip(scales, self.sources))

    def _heldout_scales(self) -> list[float]:
        """By what to weigh the held-out counts of each source."""
        return [w / source.heldout_tokens for w, source in zip(self.weights, self.sources)] if self.weights else [1.0] * len(self.sources)

    def describe(self, consumed: int) -> dict[str, Any]:
        """The entry `data` of a run's summary.json, for a run that has trained on `consumed` tokens."""
        return {
            "fingerprint": self.fingerprint,
            "source": ", ".join(source.source for source in self.sources),
            "train_tokens": self.train_tokens,
            "heldout_tokens": self.heldout_tokens,
            "unique_tokens": unique_tokens(self, consumed),
            "epochs": epochs(self, consumed),
            "skipped_records": sum(sum(source.skipped_records.values()) for source in self.sources),
            "vocab_size": self.vocab_size,
            "tokenizer": self.tokenizer_fingerprint,
            "sources": [
                {
                    "source": source.source,
                    "fingerprint": source.fingerprint,
                    "share": share,
                    "train_tokens": source.train_tokens,
                    "heldout_tokens": source.heldout_tokens,
                    "epochs": share * consumed / source.train_pairs,
                    "skipped_records": source.skipped_records,
                }
                for share, source in zip(self.shares, self.sources)
            ],
        }


def unigram_entropy(frequencies: Any) -> float:
    """Entropy in nats of tokens that occur so many times each; frequencies [vocab] need not be whole."""
    seen = frequencies[frequencies > 0]
    share = seen / seen.sum()
    return float(-(share * np.log(share)).sum())


def unique_tokens(prepared: Prepared, consumed: int) -> int:
    """How many different training tokens a run has seen that consumed so many, over all processes."""
    return sum(min(round(share * consumed), source.train_pairs) for share, source in zip(prepared.shares, prepared.sources))


def epochs(prepared: Prepared, consumed: int) -> float:
    """Passes over the training split of that source which was repeated most; above 1, tokens were repeated."""
    return max(share * consumed / source.train_pairs for share, source in zip(prepared.shares, prepared.sources))


def write_manifest(prepared: PreparedSource) -> None:
    """Writes manifest.json into the folder."""
    values = {name: value for name, value in dataclasses.asdict(prepared).items() if name != "folder"}
    (prepared.folder / MANIFEST).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> PreparedSource:
    """What `write_manifest` wrote; the folder may have been moved since.

    Raises:
      ValueError: the manifest is damaged, or a file beside it is missing or of another size.
    """
    try:
        prepared = PreparedSource(folder=folder, **json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    except TypeError as error:  # fields that are missing or unknown
        raise ValueError(f"{MANIFEST}: {error}") from error
    for name, size in prepared.sizes.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{name} is missing")
        if (now := path.stat().st_size) != size:
            raise ValueError(f"{name} has {now} bytes, not {size}")
    return prepared
