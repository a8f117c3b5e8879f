"""The cache folder: what it holds, and when it is found again."""

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from grain.sources import ArrayRecordDataSource
from small_corpus import VOCAB, data_config, write_corpus
from tokenizers import Tokenizer, models, pre_tokenizers

from mhc_jax.config import DataConfig
from mhc_jax.data.corpus import read_documents, scan, split
from mhc_jax.data.prepare import cache_root, prepare, unigram_entropy
from mhc_jax.data.prepared import Prepared, epochs, read_manifest, unique_tokens
from mhc_jax.errors import UserError


def documents(records: Path, prepared: Prepared) -> list[np.ndarray]:
    source = ArrayRecordDataSource(str(records))
    return [np.frombuffer(source[i], prepared.token_dtype) for i in range(len(source))]


def test_records_decode_to_the_files_of_their_split(prepared: Prepared, corpus_folder: Path):
    tokenizer = Tokenizer.from_file(str(prepared.tokenizer))
    for records, files in zip(
        (prepared.train_records, prepared.heldout_records), split(scan(f"{corpus_folder}/**/*.txt").files, heldout_share=0.2)
    ):
        written = documents(records, prepared)
        assert all(ids[-1] == prepared.end_of_text and prepared.end_of_text not in ids[:-1] for ids in written)
        assert all(ids.max() < VOCAB for ids in written)
        assert [tokenizer.decode(ids[:-1].tolist()) for ids in written] == [document.text for document in read_documents(files)]


def test_manifest_counts_what_was_written(prepared: Prepared, corpus_folder: Path):
    train, heldout = documents(prepared.train_records, prepared), documents(prepared.heldout_records, prepared)
    assert (prepared.train_documents, prepared.heldout_documents, prepared.skipped_files) == (len(train), len(heldout), 2)
    assert prepared.train_tokens == sum(map(len, train))
    assert prepared.heldout_tokens == sum(map(len, heldout))
    frequencies = np.bincount(np.concatenate(heldout))
    p = frequencies[frequencies > 0] / frequencies.sum()
    assert prepared.heldout_unigram_entropy == pytest.approx(-(p * np.log(p)).sum())
    heldout_files = split(scan(f"{corpus_folder}/**/*.txt").files, heldout_share=0.2)[1]
    size = sum(file.path.stat().st_size for file in heldout_files)
    assert prepared.bytes_per_token == pytest.approx(size / prepared.heldout_tokens)
    assert read_manifest(prepared.folder) == prepared


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
    assert [line.split()[0] for line in lines[:2]] == ["training", "tokenising"]
    assert first.folder.is_relative_to(tmp_path / "cache")  # MHC_JAX_CACHE
    lines.clear()
    assert prepare(data_config(corpus_folder), VOCAB, progress=lines.append) == first
    assert len(lines) == 1


def test_moved_corpus_is_found_under_its_new_name(corpus_folder: Path, tmp_path: Path):
    first = prepare(data_config(corpus_folder), VOCAB)
    shutil.copytree(corpus_folder, tmp_path / "moved")
    second = prepare(data_config(tmp_path / "moved"), VOCAB)
    assert second.folder == first.folder
    assert second.source == f"{tmp_path}/moved/**/*.txt"


def test_changed_text_or_settings_are_prepared_anew(tmp_path: Path):
    folder = write_corpus(tmp_path / "corpus", documents=8)
    config = data_config(folder)
    first = prepare(config, VOCAB)
    variants = [prepare(config, VOCAB - 1), prepare(data_config(folder, heldout_share=0.6), VOCAB)]
    variants.append(prepare(data_config(folder, tokenizer=str(first.tokenizer)), VOCAB))
    (folder / "a/001.txt").write_text("changed")
    variants.append(prepare(config, VOCAB))
    assert len({first.folder, *(variant.folder for variant in variants)}) == 5
    assert variants[-1].fingerprint != first.fingerprint


def test_given_tokenizer_is_kept_as_it_is(corpus_folder: Path, prepared: Prepared):
    again = prepare(data_config(corpus_folder, tokenizer=str(prepared.tokenizer)), 10 * VOCAB)
    assert again.tokenizer.read_bytes() == prepared.tokenizer.read_bytes()
    assert again.tokenizer_fingerprint == prepared.tokenizer_fingerprint
    assert again.train_records.read_bytes() == prepared.train_records.read_bytes()


def test_large_vocabulary_is_written_with_32_bits(tmp_path: Path):
    folder = write_corpus(tmp_path / "corpus", documents=4)
    words = {"<unk>": 70_000, "</s>": 0, "stream": 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "words.json"))
    prepared = prepare(data_config(folder, tokenizer=str(tmp_path / "words.json")), 70_001)
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
    assert list((tmp_path / "cache/data").iterdir()) == [results[0].folder]


def test_too_small_vocabulary_is_refused_before_the_corpus_is_read():
    with pytest.raises(UserError, match="at least 257"):
        prepare(DataConfig(seq_len=8, source="/nowhere/*"), 100)


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
