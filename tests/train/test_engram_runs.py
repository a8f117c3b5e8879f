"""A run with Engram keeps the file of its hash, and goes on with that one and no other."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from mhc_jax.config import override
from mhc_jax.data.ngrams.artifact import load_artifact, save_artifact
from mhc_jax.data.ngrams.hashing import NgramHash
from mhc_jax.data.pipeline import heldout_batches
from mhc_jax.data.prepare import prepare
from mhc_jax.engram_config import EngramConfig
from mhc_jax.errors import UserError
from mhc_jax.experiments.memory_study import gates_of
from mhc_jax.experiments.run_attention import network_of_run
from mhc_jax.train.loop import train
from mhc_jax.train.metrics import read_lines

ENGRAM = EngramConfig(layers=(1,), table_sizes=(101, 211), heads=2)


def quiet(_):
    pass


@pytest.fixture(scope="module")
def run(tiny, compiled_once, tmp_path_factory):
    config = override(tiny, {"model.engram": ENGRAM, "train.steps": 4, "train.microbatches": 2})
    folder = tmp_path_factory.mktemp("runs") / "engram"
    train(config, folder, say=quiet)
    return config, folder


@pytest.fixture
def cut(run, tmp_path):
    """The run as if it had been cut after step 2, and its artifact."""
    config, folder = run
    copy = tmp_path / "cut"
    shutil.copytree(folder, copy)
    (copy / "summary.json").unlink()
    shutil.rmtree(copy / "checkpoints" / "4")
    about = json.loads((copy / "checkpoints" / "2" / "about.json").read_text())
    fits = about["content"]["data"]["fits"]
    return config, copy, load_artifact(copy / "engram.json", ENGRAM, fits["tokenizer"]), fits


@pytest.mark.slow
def test_a_cut_run_goes_on_with_its_file_and_makes_it_again_when_it_is_gone(run, cut):
    config, folder, artifact, fits = cut
    assert fits["n-gram tables"] == artifact.checksum
    whole = (run[1] / "engram.json").read_bytes()
    (folder / "engram.json").unlink()
    train(config, folder, say=quiet)
    assert (folder / "engram.json").read_bytes() == whole
    curves = [[line["loss"] for line in read_lines(of / "metrics.jsonl")] for of in (folder, run[1])]
    assert curves[0] == curves[1]


def test_a_damaged_file_and_another_layout_are_refused(cut):
    config, folder, artifact, _ = cut
    save_artifact(dataclasses.replace(artifact, config=dataclasses.replace(ENGRAM, seed=3)), folder / "engram.json")
    with pytest.raises(UserError, match=r"another layout of model\.engram: seed 3, now 0"):
        train(config, folder, say=quiet)
    (folder / "engram.json").write_text("{")
    with pytest.raises(UserError, match=r"engram\.json is damaged"):
        train(config, folder, say=quiet)


def test_a_checkpoint_of_other_multipliers_is_refused(cut):
    config, folder, artifact, _ = cut
    save_artifact(dataclasses.replace(artifact, multipliers=artifact.multipliers + 2), folder / "engram.json")
    with pytest.raises(UserError, match=f"n-gram tables {artifact.checksum}, now"):
        train(config, folder, say=quiet)


@pytest.mark.slow
def test_gates_are_of_a_tokens_own_past(run, cut):
    """Numbers between 0 and 1 for every token; those before a token that is changed stay what they were, bit for bit."""
    (config, folder), artifact = run, cut[2]
    ngrams = NgramHash(artifact)
    data = prepare(config.data, config.model.vocab_size, progress=quiet)
    batch = heldout_batches(data, seq_len=config.data.seq_len, sequences=1, batch_size=1, ngrams=ngrams)[0]
    tokens = batch["tokens"].copy()
    tokens[0, 20] = (tokens[0, 20] + 7) % artifact.lookup.size
    gates, others = gates_of(config, folder, [batch, ngrams.add_rows({**batch, "tokens": tokens})])
    assert gates.shape == (1, config.data.seq_len)
    assert np.all((gates > 0) & (gates < 1))
    assert np.array_equal(gates[:, :20], others[:, :20]) and not np.array_equal(gates[:, 20:], others[:, 20:])


def test_recall_is_not_measured_of_a_run_with_tables(run):
    with pytest.raises(UserError, match="without Engram"):
        network_of_run(run[1])
