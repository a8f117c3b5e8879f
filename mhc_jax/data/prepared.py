"""What a folder of tokenised text holds, and how much of it a run has used. Making such a folder is the job of prepare."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Prepared:
    """A tokenised corpus: train.array_record and heldout.array_record, tokenizer.json and manifest.json.

    A record is one document: its token ids followed by end-of-text, little-endian unsigned integers of `token_bits` bits.
    """

    folder: Path
    source: str  # data.source
    fingerprint: str  # of the corpus
    tokenizer_fingerprint: str
    vocab_size: int  # of the tokenizer; the model's may be larger
    end_of_text: int  # token id
    token_bits: int  # 16 or 32
    train_documents: int
    heldout_documents: int
    skipped_files: int  # left out because they are empty or not UTF-8
    train_tokens: int  # end-of-text included
    heldout_tokens: int  # end-of-text included
    heldout_unigram_entropy: float  # nats a token, under the held-out tokens' own frequencies
    bytes_per_token: float  # UTF-8 bytes of the held-out text over heldout_tokens; converts nats a token to bits a byte

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

    def describe(self, consumed: int) -> dict[str, Any]:
        """The entry `data` of a run's summary.json, for a run that has trained on `consumed` tokens."""
        return {
            "fingerprint": self.fingerprint,
            "source": self.source,
            "train_tokens": self.train_tokens,
            "heldout_tokens": self.heldout_tokens,
            "unique_tokens": unique_tokens(self, consumed),
            "epochs": epochs(self, consumed),
            "vocab_size": self.vocab_size,
            "tokenizer": self.tokenizer_fingerprint,
        }


def unique_tokens(prepared: Prepared, consumed: int) -> int:
    """How many different training tokens a run has seen that consumed so many, over all processes."""
    return min(consumed, prepared.train_pairs)


def epochs(prepared: Prepared, consumed: int) -> float:
    """Passes over the training split; above 1, tokens were repeated."""
    return consumed / prepared.train_pairs


def write_manifest(prepared: Prepared) -> None:
    """Writes manifest.json into the folder."""
    values = {name: value for name, value in dataclasses.asdict(prepared).items() if name != "folder"}
    (prepared.folder / MANIFEST).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Prepared:
    """What `write_manifest` wrote; the folder may have been moved since."""
    return Prepared(folder=folder, **json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
