"""Damaged tokenizer.json files: refused, or a tokenizer whose ids all lie below its size, which the model's vocabulary holds."""

import functools
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mhc_jax.data.tokenizer import load_tokenizer, train_tokenizer

from .harness import ACCEPTED, Check, Wrong
from .mutate import damage_file, damage_json, write_odd_json

NAME, SHARE, SHORT = "tokenizer files", 20, 40

VOCAB = 300
TEXTS = ["the stream of the residual stream", "naïve mixing\n\tof streams 流", "", " ", "<|endoftext|> a b", "\0\U0001f99c", "x" * 500]

os.environ["RUST_BACKTRACE"] = "0"  # the library's panics are looked for, and would print pages


@functools.cache
def _intact() -> list[dict[str, Any]]:
    """One tokenizer of each kind."""
    word_level = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "stream": 2, "</s>": 3}, unk_token="<unk>"))
    word_level.pre_tokenizer = pre_tokenizers.Whitespace()
    pieces = Tokenizer(models.WordPiece({"[UNK]": 0, "the": 1, "st": 2, "##ream": 3, "</s>": 4}, unk_token="[UNK]"))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("the", -1.0), ("s", -2.0), ("tream", -2.5), ("</s>", -9.0)], unk_id=0))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Metaspace()
    return [json.loads(train_tokenizer(TEXTS, 280).json)] * 3 + [json.loads(t.to_str()) for t in (word_level, pieces, unigram)]


def case(rng: random.Random, room: Path) -> tuple[str, Check]:
    data, path = rng.choice(_intact()), room / "tokenizer.json"
    if rng.random() < 0.7:
        data, done = _damaged(rng, data)
        write_odd_json(path, data)
    else:
        write_odd_json(path, data)
        done = damage_file(rng, path)
    kind = data["model"].get("type") if isinstance(data, dict) and isinstance(data.get("model"), dict) else None
    return f"{kind}: {done}", lambda: _check(path)


def _damaged(rng: random.Random, data: dict[str, Any]) -> tuple[Any, str]:
    """Most values of a tokenizer are ids and merges; the others should be met as often."""
    part = rng.choice(["all", "model", "vocab", "merges", "settings", "deep", "ids", "ids", "dropout"])
    model = data["model"]
    if part == "dropout":
        share = rng.choice([0.0, 0.3, 0.9, 1.0, 1.5, -0.1])
        return data | {"model": model | {"dropout": share}}, f"dropout {share}"
    if part == "ids" and isinstance(model["vocab"], dict):
        token, number = rng.choice(list(model["vocab"])), rng.choice([0, 1, 5, VOCAB - 1, VOCAB, 10**6, 2**32 - 1, 2**32])
        return data | {"model": model | {"vocab": model["vocab"] | {token: number}}}, f"{token!a} has the id {number}"
    if part == "deep":
        depth, normalizer = rng.choice([5, 100, 5000]), {"type": "Lowercase"}
        text = '{"type":"Sequence","normalizers":[' * depth + json.dumps(normalizer) + "]}" * depth
        return data | {"normalizer": json.loads(text) if depth < 500 else [[[]]] * 3}, f"normalizers {depth} deep"
    if part in ("vocab", "merges") and model.get(part):
        inner, done = damage_json(rng, model[part], rng.choice([1, 2, 5]))
        return data | {"model": model | {part: inner}}, f"{part}: {done}"
    if part == "model":
        small = {key: value for key, value in model.items() if key not in ("vocab", "merges")}
        inner, done = damage_json(rng, small, rng.choice([1, 2]))
        rest = {key: value for key, value in model.items() if key in ("vocab", "merges")}
        return data | {"model": inner | rest if isinstance(inner, dict) else inner}, f"model: {done}"
    if part == "settings":
        small, done = damage_json(rng, {key: value for key, value in data.items() if key != "model"}, rng.choice([1, 2]))
        return (small | {"model": model} if isinstance(small, dict) else small), done
    return damage_json(rng, data, rng.choice([1, 2]))


def _check(path: Path) -> str:
    tokenizer = load_tokenizer(path, VOCAB)
    if not 0 <= tokenizer.end_of_text < tokenizer.size <= VOCAB:
        raise Wrong(f"size {tokenizer.size} and end-of-text {tokenizer.end_of_text} in a vocabulary of {VOCAB}")
    vocab = json.loads(path.read_text())["model"]["vocab"]
    if isinstance(vocab, dict) and (len(set(vocab.values())) < len(vocab) or max(vocab.values()) >= VOCAB):
        raise Wrong("accepted, though two tokens share an id, or one has an id beyond the model's vocabulary")
    first = tokenizer.encode(TEXTS)
    if len(first) != len(TEXTS):
        raise Wrong(f"{len(TEXTS)} texts became {len(first)}")
    for text, ids, again in zip(TEXTS, first, tokenizer.encode(TEXTS)):
        if ids.dtype != np.int64 or (ids.size and not 0 <= ids.min() <= ids.max() < tokenizer.size):
            raise Wrong(f"{text[:40]!r} has ids {ids.min()} to {ids.max()} with size {tokenizer.size}")
        if not np.array_equal(ids, again):
            raise Wrong(f"{text[:40]!r} becomes other ids the second time")
    return ACCEPTED
