"""What turns tokens into rows of a run's tables, made once and kept beside the run: trained tables are worthless with any other.

The file is JSON with a sha256 of its content. The multipliers, which need 63 bits, are strings in it: many readers of JSON keep 53.
"""

import dataclasses
import hashlib
import json
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64

from mhc_jax.data.ngrams.compression import compress_vocabulary
from mhc_jax.data.prepared import Prepared
from mhc_jax.data.tokenizer import TextTokenizer, load_tokenizer
from mhc_jax.engram_config import HASH_FIELDS, ROWS_LIMIT, SMALLEST_TABLE, EngramConfig
from mhc_jax.engram_layout import multipliers, table_primes
from mhc_jax.errors import UserError
from mhc_jax.files import AnyPath, write_atomically
from mhc_jax.typecheck import shown

FORMAT = 1
FILE = "engram.json"  # in a run folder


@dataclasses.dataclass(frozen=True, eq=False)
class EngramArtifact:
    """Compression of the vocabulary and layout of the tables. `checksum` is the identity of both."""

    config: EngramConfig
    tokenizer: str  # fingerprint, see TextTokenizer
    pad: int  # class of the padding token
    lookup: Int32[np.ndarray, " vocab"]  # class of each token id
    multipliers: Int64[np.ndarray, "layers lookback"]  # lookback 0 is the token itself
    primes: Int64[np.ndarray, "layers orders heads"]  # rows of each table

    @property
    def classes(self) -> int:
        """V', how many classes of tokens there are."""
        return int(self.lookup.max()) + 1

    @property
    def rows(self) -> Int64[np.ndarray, " layers"]:
        """Rows of the one table that a layer keeps its heads' tables in, one after the other, not padded to any multiple."""
        return self.primes.sum(axis=(1, 2))

    @property
    def offsets(self) -> Int64[np.ndarray, "layers heads"]:
        """The row at which each head's table begins; the heads of the first order come first."""
        flat = self.primes.reshape(len(self.primes), -1)
        return np.cumsum(flat, axis=1) - flat

    @cached_property
    def checksum(self) -> str:
        """sha256 of all of it, hexadecimal."""
        return _digest(_content(self))


def build_artifact(config: EngramConfig, tokenizer: TextTokenizer) -> EngramArtifact:
    """The artifact of a config and a tokenizer; the same on every machine.

    Raises:
      UserError: the padding token is not in the vocabulary, or there are too many rows.
    """
    lookup = compress_vocabulary(tokenizer) if config.compression else np.arange(tokenizer.size, dtype=np.int32)
    pad_id = tokenizer.end_of_text if config.pad_id is None else config.pad_id
    if pad_id >= lookup.size:
        raise UserError(f"model.engram.pad_id is {pad_id}, but the tokenizer's ids are 0 to {lookup.size - 1}; choose one of them")
    return EngramArtifact(
        config=config,
        tokenizer=tokenizer.fingerprint,
        pad=int(lookup[pad_id]),
        lookup=lookup,
        multipliers=multipliers(config, int(lookup.max()) + 1),
        primes=table_primes(config),
    )


def open_artifact(folder: AnyPath, config: EngramConfig, data: Prepared) -> EngramArtifact:
    """The artifact of a run folder, where it has one; else a new one, not saved yet.

    Raises:
      UserError: see `load_artifact` and `build_artifact`.
    """
    if (folder / FILE).exists():
        return load_artifact(folder / FILE, config, data.tokenizer_fingerprint)
    return build_artifact(config, load_tokenizer(data.sources[0].tokenizer, data.vocab_size))


def save_artifact(artifact: EngramArtifact, path: AnyPath) -> None:
    """Writes the file, atomically."""
    content = _content(artifact)
    write_atomically(path, json.dumps({"content": content, "sha256": _digest(content)}) + "\n")


def load_artifact(path: AnyPath, config: EngramConfig, tokenizer: str) -> EngramArtifact:
    """The artifact in a file, exactly as it was saved: nothing is computed anew, whatever NumPy and tokenizers would give today.

    Args:
      path: of the file.
      config: what the run wants.
      tokenizer: fingerprint of the tokenizer that the run's tokens come from.

    Raises:
      UserError: the file cannot be read, is damaged, or is that of another tokenizer or another layout.
    """
    content = _read(path)
    if content.get("format") != FORMAT:
        raise UserError(f"{path} has the format {content.get('format')}, not {FORMAT}: it was written by another version; use that one")
    try:
        values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in content["config"].items()}
        saved = EngramConfig(**values)
        artifact = EngramArtifact(
            config=saved,
            tokenizer=content["tokenizer"],
            pad=content["pad"],
            lookup=np.array(content["lookup"], np.int32),
            multipliers=np.array([[int(m) for m in of_layer] for of_layer in content["multipliers"]], np.int64),
            primes=np.array(content["primes"], np.int64),
        )
        # A number that its array cannot hold would have been cut: the checksum of what was read tells.
        wrong = _inconsistent(artifact) or (None if artifact.checksum == _digest(content) else "it holds what the arrays cannot")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, IndexError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    if wrong:
        raise _damaged(path, wrong)
    if artifact.tokenizer != tokenizer:
        raise UserError(
            f"{path} was made for another tokenizer (its sha256 begins with {artifact.tokenizer[:12]}, that of this run's with "
            f"{tokenizer[:12]}): the rows would be those of other words. Give the tokenizer that the run began with, or another run folder"
        )
    ours, theirs = _hash_fields(config), _hash_fields(saved)
    if differ := [f"{name} {shown(theirs[name])}, now {ours[name]}" for name in ours if ours[name] != theirs[name]]:
        raise UserError(
            f"{path} was made for another layout of model.engram: {'; '.join(differ)}. Go on with what it was made for, or give another "
            "run folder"
        )
    return artifact


def _hash_fields(config: EngramConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in HASH_FIELDS}


def _content(artifact: EngramArtifact) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "config": json.loads(json.dumps(_hash_fields(artifact.config))),
        "tokenizer": artifact.tokenizer,
        "pad": artifact.pad,
        "lookup": artifact.lookup.tolist(),
        "multipliers": [[str(m) for m in of_layer] for of_layer in artifact.multipliers.tolist()],
        "primes": artifact.primes.tolist(),
    }


def _read(path: AnyPath) -> dict[str, Any]:
    """The content of the file, when it is what was saved."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        content, digest = document["content"], document["sha256"]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, "it cannot be read") from error
    if digest != _digest(content) or not isinstance(content, dict):
        raise _damaged(path, "it differs from what was saved")
    return content


def _inconsistent(artifact: EngramArtifact) -> str | None:
    """What does not fit together in a file whose checksum is right, so that no later step fails on it."""
    config = artifact.config
    layers, orders = len(config.layers), len(config.orders)
    shapes = (artifact.lookup.ndim, artifact.multipliers.shape, artifact.primes.shape)
    if not isinstance(artifact.tokenizer, str):
        return "it does not name a tokenizer"
    if shapes != (1, (layers, config.orders[-1]), (layers, orders, config.heads)):
        return "its arrays do not have the sizes that its own config asks for"
    if not artifact.lookup.size or artifact.lookup.min() < 0 or not 0 <= artifact.pad < artifact.classes:
        return "its classes of tokens are not numbered from 0"
    if artifact.primes.min() < SMALLEST_TABLE or (artifact.primes % 2 == 0).any() or artifact.rows.max() >= ROWS_LIMIT:
        return "its tables do not have odd numbers of rows, 3 or more each and fewer than 2^31 together"
    if artifact.multipliers.min() < 1 or int(artifact.multipliers.max()) * (artifact.classes - 1) >= 2**63:
        return "its products do not fit into 63 bits"
    return None


def _damaged(path: AnyPath, why: str) -> UserError:
    return UserError(
        f"{path} is damaged ({why[:200]}); put a good copy back or delete it: it is made anew, and a checkpoint that was made with another "
        "is refused"
    )


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
