"""The cache folder: what it holds, and when it is found again."""

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from grain.sources import ArrayRecordDataSource
from small_corpus import VOCAB, data_config, texts, write_array_record, write_corpus
from small_corpus import documents as corpus_documents
from tokenizers import Tokenizer, models, pre_tokenizers

from mhc_jax.config import DataConfig
from mhc_jax.data.pipeline import training_batches
from mhc_jax.data.prepare import cache_root, prepare
from mhc_jax.data.prepared import Prepared, PreparedSource, epochs, read_manifest, unigram_entropy, unique_tokens
from mhc_jax.errors import UserError


def documents(records: Path, prepared: PreparedSource) -> list[np.ndarray]:
    source = ArrayRecordDataSource(str(records))
    return [np.frombuffer(source[i], prepared.token_dtype) for i in range(len(source))]


def test_records_decode_to_the_documents_of_their_split(prepared: Prepared, corpus_folder: Path, tmp_path: Path):
    (source,) = prepared.sources
    tokenizer = Tokenizer.from_file(str(source.tokenizer))
    everything = list(corpus_documents(f"{corpus_folder}/**/*.txt", tmp_path, max_bad_records=2))
    for records, held in ((source.train_records, False), (source.heldout_records, True)):
        written = documents(records, source)
        assert all(ids[-1] == source.end_of_text and source.end_of_text not in ids[:-1] for ids in written)
        assert all(ids.max() < VOCAB for ids in written)
        assert [tokenizer.decode(ids[:-1].tolist()) for ids in written] == [text for text, is_held in everything if is_held == held]


def test_manifest_counts_what_was_written(prepared: Prepared, corpus_folder: Path, tmp_path: Path):
    (source,) = prepared.sources
    train, heldout = documents(source.train_records, source), documents(source.heldout_records, source)
    assert (source.train_documents, source.heldout_documents) == (len(train), len(heldout))
    assert source.skipped_records == {"empty": 1, "not UTF-8": 1}
    assert prepared.train_tokens == sum(map(len, train))
    assert prepared.heldout_tokens == sum(map(len, heldout))
    frequencies = np.bincount(np.concatenate(heldout))
    p = frequencies[frequencies > 0] / frequencies.sum()
    assert prepared.heldout_unigram_entropy == pytest.approx(-(p * np.log(p)).sum())
    everything = corpus_documents(f"{corpus_folder}/**/*.txt", tmp_path, max_bad_records=2)
    size = sum(len(text.encode()) for text, held in everything if held)
    assert prepared.bytes_per_token == pytest.approx(size / prepared.heldout_tokens)
    assert read_manifest(source.folder) == source


def test_unigram_entropy():
    assert unigram_entropy(np.array([5, 5, 0, 5, 5])) == pytest.approx(np.log(4))
    assert unigram_entropy(np.array([7, 0])) == 0


def test_use_of_the_corpus(prepared: Prepared):
    pairs = prepared.train_tokens - prepared.train_documents
    assert (unique_tokens(prepared, pairs // 2), unique_tokens(prepared, 3 * pairs)) == (pairs // 2, pairs)
    assert epochs(prepared, 3 * pairs) == 3
    assert prepared.describe(pairs)["unique_tokens"] == pairs


def test_second_call_finds_the_first(corpus_folder: Path, tmp_path: Path):
    lines: list[str] = []
    first = prepare(data_config(corpus_folder), VOCAB, progress=lines.append)
    assert [line.split()[0] for line in lines[:3]] == ["training", "skipping", "tokenising"]
    assert "1 empty, 1 not UTF-8 (the first: " in lines[1]
    assert first.sources[0].folder.is_relative_to(tmp_path / "cache")  # MHC_JAX_CACHE
    lines.clear()
    assert prepare(data_config(corpus_folder), VOCAB, progress=lines.append) == first
    assert len(lines) == 1


def test_moved_corpus_is_found_under_its_new_name(corpus_folder: Path, tmp_path: Path):
    first = prepare(data_config(corpus_folder), VOCAB)
    shutil.copytree(corpus_folder, tmp_path / "moved")
    second = prepare(data_config(tmp_path / "moved"), VOCAB)
    assert second.sources[0].folder == first.sources[0].folder
    assert second.sources[0].source == f"{tmp_path}/moved/**/*.txt"


def test_changed_text_or_settings_are_prepared_anew(tmp_path: Path):
    folder = write_corpus(tmp_path / "corpus", documents=8)
    config = data_config(folder)
    first = prepare(config, VOCAB)
    variants = [prepare(config, VOCAB - 30), prepare(data_config(folder, heldout_share=0.6), VOCAB)]
    variants.append(prepare(data_config(folder, tokenizer=str(first.sources[0].tokenizer)), VOCAB))
    (folder / "a/001.txt").write_text("changed")
    variants.append(prepare(config, VOCAB))
    assert len({prepared.sources[0].folder for prepared in (first, *variants)}) == 4  # the third has the same tokenizer as the first
    assert variants[-1].fingerprint != first.fingerprint


def test_given_tokenizer_is_kept_as_it_is(corpus_folder: Path, prepared: Prepared):
    again = prepare(data_config(corpus_folder, tokenizer=str(prepared.sources[0].tokenizer)), 10 * VOCAB)
    assert again.tokenizer_fingerprint == prepared.tokenizer_fingerprint
    for name in ("tokenizer.json", "train.array_record", "heldout.array_record"):
        assert (again.sources[0].folder / name).read_bytes() == (prepared.sources[0].folder / name).read_bytes()


def test_large_vocabulary_is_written_with_32_bits(tmp_path: Path):
    folder = write_corpus(tmp_path / "corpus", documents=4)
    words = {"<unk>": 70_000, "</s>": 0, "stream": 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "words.json"))
    (prepared,) = prepare(data_config(folder, tokenizer=str(tmp_path / "words.json")), 70_001).sources
    assert prepared.token_bits == 32
    assert max(ids.max() for ids in documents(prepared.train_records, prepared)) == 70_000


def test_tokenizer_that_finds_nothing(tmp_path: Path):
    folder = write_corpus(tmp_path / "corpus", documents=4)
    Tokenizer(models.BPE(vocab={"</s>": 0, "Ж": 1}, merges=[])).save(str(tmp_path / "other.json"))
    with pytest.raises(UserError, match="finds no token"):
        prepare(data_config(folder, tokenizer=str(tmp_path / "other.json")), VOCAB)


def test_interruption_leaves_nothing_behind(corpus_folder: Path, tmp_path: Path):
    def interrupt(line: str) -> None:
        if line.startswith("tokenising"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(data_config(corpus_folder), VOCAB, progress=interrupt)
    assert list((tmp_path / "cache/data").iterdir()) == []


def test_two_at_once_agree(corpus_folder: Path, tmp_path: Path):
    both = threading.Barrier(2)
    results: list[Prepared] = []

    def wait(line: str) -> None:
        if line.startswith("tokenising"):
            both.wait(timeout=30)

    def call() -> None:
        results.append(prepare(data_config(corpus_folder), VOCAB, progress=wait))

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] == results[1]
    assert list((tmp_path / "cache/data").iterdir()) == [results[0].sources[0].folder]


def test_too_small_vocabulary_is_refused_before_the_corpus_is_read():
    with pytest.raises(UserError, match="at least 257"):
        prepare(DataConfig(seq_len=8, source=("/nowhere/*",)), 100)


def test_cache_that_cannot_be_written(corpus_folder: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*set MHC_JAX_CACHE"):
        prepare(data_config(corpus_folder), VOCAB, cache=tmp_path / "file")


def test_cache_root_follows_the_environment(tmp_path: Path, monkeypatch):
    assert cache_root() == tmp_path / "cache"
    monkeypatch.delenv("MHC_JAX_CACHE")
    assert cache_root() == Path.home() / ".cache/mhc_jax"


def test_stdlib_can_be_prepared():
    prepared = prepare(DataConfig(seq_len=256, heldout_share=0.9), 512)  # little to train on: the tokenizer is trained faster
    assert prepared.vocab_size == 512
    assert prepared.train_tokens + prepared.heldout_tokens > 2_000_000
    assert 1.5 < prepared.bytes_per_token < 4
    assert 4 < prepared.heldout_unigram_entropy < np.log(512)


def test_importing_starts_no_device_and_needs_no_flax():
    program = (
        "import sys, mhc_jax.data.pipeline, mhc_jax.data.prepare\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()\n"
        "assert 'flax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def settled(source: str, **changes) -> DataConfig:
    return DataConfig(**{"seq_len": 32, "source": (source,), "heldout_share": 0.2, "max_bad_records": 0, **changes})


def test_the_same_documents_give_the_same_tokens_from_every_format(tmp_path: Path):
    written = texts(60)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in written))
    write_array_record(tmp_path / "a.array_record", [text.encode() for text in written])
    pq.write_table(pa.table({"text": written}), tmp_path / "a.parquet")
    found = [prepare(settled(f"{tmp_path}/a.{suffix}"), VOCAB).sources[0] for suffix in ("jsonl", "array_record", "parquet")]
    for name in ("tokenizer.json", "train.array_record", "heldout.array_record"):
        assert len({(source.folder / name).read_bytes() for source in found}) == 1


def test_one_glob_may_mix_formats(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    write_array_record(tmp_path / "b.array_record", [b"three"])
    (tmp_path / "c.txt").write_text("four")
    prepared = prepare(settled(f"{tmp_path}/?.*"), VOCAB)
    assert prepared.sources[0].train_documents + prepared.sources[0].heldout_documents == 4


def test_a_lower_limit_of_bad_records_is_heeded_by_an_older_cache(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in "abcd") + "x\ny\n")
    source = str(tmp_path / "a.jsonl")
    first = prepare(settled(source, max_bad_records=2), VOCAB)
    assert first.describe(0)["skipped_records"] == 2
    with pytest.raises(UserError, match=r"a\.jsonl, record 6 is not JSON"):
        prepare(settled(source, max_bad_records=1), VOCAB)
    assert prepare(settled(source, max_bad_records=2), VOCAB) == first


@pytest.mark.parametrize("name", ["train.array_record", "heldout_frequencies.npy", "manifest.json"])
@pytest.mark.parametrize("damage", ["missing", "short", "empty"])
def test_a_cache_of_other_sizes_is_made_anew(corpus_folder: Path, name: str, damage: str):
    first = prepare(data_config(corpus_folder), VOCAB)
    path = first.sources[0].folder / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "short" else b"")
    lines: list[str] = []
    assert prepare(data_config(corpus_folder), VOCAB, progress=lines.append) == first
    assert "is damaged" in lines[0]
    assert path.read_bytes() == content
    assert list(path.parent.parent.iterdir()) == [path.parent]


def test_a_damaged_cached_tokenizer_is_trained_anew(corpus_folder: Path, tmp_path: Path):
    first = prepare(data_config(corpus_folder), VOCAB)
    (kept,) = (tmp_path / "cache/tokenizers").glob("*/tokenizer.json")
    kept.write_text(kept.read_text()[:100])
    assert prepare(data_config(corpus_folder), VOCAB) == first
    assert kept.read_text() == first.sources[0].tokenizer.read_text()


def test_a_damaged_record_stops_training_and_names_what_to_delete(corpus_folder: Path):
    """Changed bytes that leave the size alone are found when the record is read, in this process and in workers."""
    prepared = prepare(data_config(corpus_folder), VOCAB)
    (source,) = prepared.sources
    content = bytearray(source.train_records.read_bytes())
    content[2000] ^= 1
    source.train_records.write_bytes(content)
    assert prepare(data_config(corpus_folder), VOCAB) == prepared
    message = rf"train\.array_record is damaged \(record \d+: .*delete the folder {source.folder}"
    for workers in (0, 1):
        iterator = training_batches(prepared, seq_len=32, batch_size=4, seed=0, repeat=False, workers=workers)
        with pytest.raises(UserError, match=message):
            list(iterator)
        iterator.close()


def test_records_of_another_number_are_noticed(corpus_folder: Path):
    prepared = prepare(data_config(corpus_folder), VOCAB)
    other = write_array_record(prepared.sources[0].train_records, [b"12"])
    with pytest.raises(UserError, match=rf"{other} is damaged \(it has 1 records, not \d+\)"):
        training_batches(prepared, seq_len=8, batch_size=1, seed=0)
    other.write_bytes(b"short")
    with pytest.raises(UserError, match="is damaged"):
        training_batches(prepared, seq_len=8, batch_size=1, seed=0)
