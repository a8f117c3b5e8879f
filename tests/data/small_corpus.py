"""Makes the text that the tests of this folder read."""

import random
from pathlib import Path

from mhc_jax.config import DataConfig

VOCAB = 300


def write_corpus(folder: Path, documents: int = 60, seed: int = 0) -> Path:
    """Files of 1 to about 2000 characters, no two alike, in two folders; one more is empty and one is not UTF-8."""
    rng = random.Random(seed)
    words = ["stream", "residual", "mixing", "doubly", "stochastic", "naïve", "流", "the", "of", "and", "\n", "    return x"]
    for i in range(documents):
        path = folder / ("a" if i % 2 else "b/c") / f"{i:03}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        length = 0 if i == 0 else rng.choice([1, 5, 50, 300])
        path.write_text(" ".join([f"{i}", *rng.choices(words, k=length)]), encoding="utf-8")
    (folder / "a" / "empty.txt").write_text("")
    (folder / "a" / "latin.txt").write_bytes("naïve".encode("latin-1"))
    return folder


def data_config(folder: Path, **changes) -> DataConfig:
    return DataConfig(**{"seq_len": 32, "source": f"{folder}/**/*.txt", "heldout_share": 0.2, **changes})
