"""Text from a trained run: the network's own likeliest tokens, draws that depend on nothing else, and messages for bad input."""

import dataclasses
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import BASE, shaken

from mhc_jax.cli import main
from mhc_jax.config import MeshConfig, override, to_json
from mhc_jax.data.ngrams.artifact import build_artifact, load_artifact, save_artifact
from mhc_jax.data.ngrams.hashing import NgramHash
from mhc_jax.data.tokenizer import train_tokenizer
from mhc_jax.engram_config import EngramConfig
from mhc_jax.files import write_atomically, write_json
from mhc_jax.generate import Generator, Sampling, generator
from mhc_jax.generate.sampling import keys_of, sample
from mhc_jax.generate.text import TextPieces
from mhc_jax.nn.decoder import logits
from mhc_jax.sparse_config import SparseConfig
from mhc_jax.train.checkpoint import Checkpoints
from mhc_jax.train.loop import train
from mhc_jax.train.parameters import parameters_of
from mhc_jax.train.step import initial_state

PROMPTS = ["", "four rows sum to one and the residual stream mixes four rows", "stream"]
GREEDY = Sampling(temperature=0)


CONFIG = override(
    BASE,
    {
        "model.vocab_size": 300,
        "model.num_layers": 2,
        "model.attention.q_rank": 6,
        "model.attention.sparse": SparseConfig(index_heads=2, index_dim=8, top_k=8, query_chunk=8),
        "model.engram": EngramConfig(layers=(1,), table_sizes=(101, 211), heads=2, head_dim=4),
        "data.seq_len": 32,
    },
)
WORDS = ["stream", "residual", "mixes", "four", "rows", "sum", "to", "one"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What a run leaves, untrained: streams that differ, chosen keys, experts, a memory with its convolution."""
    folder, rng = tmp_path_factory.mktemp("generate") / "run", random.Random(0)
    tokenizer = train_tokenizer([" ".join(rng.choices(WORDS, k=100)) for _ in range(20)], 290)
    write_json(folder / "config.json", to_json(CONFIG))
    write_atomically(folder / "tokenizer.json", tokenizer.json)
    save_artifact(build_artifact(CONFIG.model.engram, tokenizer), folder / "engram.json")
    state = jax.jit(lambda: initial_state(CONFIG))()
    with Checkpoints(folder, CONFIG) as checkpoints:
        checkpoints.save(state._replace(model=shaken(state.model), router_bias=state.router_bias + 0.1 * jnp.arange(4.0)[None]), {})
    return folder


@pytest.fixture(scope="module")
def opened(run):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generator, "PREFILL", 16)  # so that the longest prompt takes several chunks
        yield Generator.open(run)


@pytest.fixture(scope="module")
def greedy(opened):
    return opened.generate(PROMPTS, 6, sampling=GREEDY)


def test_greedy_tokens_are_the_likeliest_of_the_whole_pass(run, opened, greedy):
    """The network as training runs it, over each prompt with what was drawn for it."""
    config, tokenizer = CONFIG, opened.tokenizer
    state, _, missing = parameters_of(
        run, config, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(lambda: initial_state(config)))
    )
    assert not missing and float(jnp.abs(state.memory.tables[0]).max()) > 0
    hashing = NgramHash(load_artifact(run / "engram.json", config.model.engram, tokenizer.fingerprint))
    prompts = [list(map(int, ids)) or [tokenizer.end_of_text] for ids in tokenizer.encode(PROMPTS)]
    assert [len(ids) > 16 for ids in prompts] == [False, True, False]
    whole = np.zeros((3, 32), np.int32)
    for row, ids, drawn in zip(whole, prompts, greedy.tokens):
        row[: len(ids) + len(drawn)] = ids + drawn
    rows = hashing.rows(whole, np.ones_like(whole))[:, :, 0]
    read = state.memory.tables[0][rows].reshape(3, 32, -1)
    positions = jnp.broadcast_to(jnp.arange(32), whole.shape)
    run_whole = jax.jit(
        lambda model, tokens, read: logits(model, tokens, positions, jnp.ones_like(tokens), state.router_bias, memory=(read,))
    )
    found = np.asarray(run_whole(state.model, jnp.asarray(whole), read))[..., : tokenizer.size]
    for row, ids, drawn in zip(found, prompts, greedy.tokens):
        assert drawn == row[len(ids) - 1 :][: len(drawn)].argmax(axis=-1).tolist()


@pytest.mark.slow
def test_a_mesh_draws_what_one_device_does(run, greedy, monkeypatch):
    """Three prompts for four parts of a batch; every program is compiled once."""
    monkeypatch.setattr(generator, "PREFILL", 16)
    split = Generator.open(run, MeshConfig(fsdp=2, expert=2, tensor=2))
    assert split.generate(PROMPTS, 6, sampling=GREEDY).tokens == greedy.tokens
    assert split._step._cache_size() == split._prefill._cache_size() == 1


@pytest.mark.slow
def test_draws_depend_on_seed_and_prompt_alone(opened):
    drawn = opened.generate([PROMPTS[2], PROMPTS[2], PROMPTS[1]], 6, seed=3).tokens
    assert drawn[0] != drawn[1]  # the same prompt once more is another draw
    alone = [opened.generate([prompt], 6, seed=3).tokens[0] for prompt in (PROMPTS[2], PROMPTS[1])]
    assert alone == [drawn[0], drawn[2]]
    assert opened.generate([PROMPTS[1]], 6, seed=4).tokens[0] != drawn[2]


def test_pieces_of_a_single_prompt_make_its_text(opened):
    pieces: list[str] = []
    done = opened.generate([PROMPTS[1]], 8, seed=1, say=pieces.append)
    assert len(pieces) == 8
    joined = "".join(pieces)
    assert done.texts[0].startswith(joined) and not done.texts[0][len(joined) :].strip("\N{REPLACEMENT CHARACTER}")


def test_a_sequence_stops_at_its_end_of_text(opened, greedy, monkeypatch):
    """With another token as end-of-text: one that was drawn."""
    stop = greedy.tokens[1][2]
    monkeypatch.setattr(opened, "tokenizer", dataclasses.replace(opened.tokenizer, end_of_text=stop))
    done = opened.generate([PROMPTS[1], PROMPTS[2], PROMPTS[2]], 6, sampling=GREEDY)
    for own, free in zip(done.tokens, (greedy.tokens[1], greedy.tokens[2], greedy.tokens[2])):
        assert own == (free[: free.index(stop) + 1] if stop in free else free)
    assert len(done.tokens[0]) <= 3


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (Sampling(1.0), 5),
        (Sampling(0.5), 5),
        (Sampling(1.0, top_k=2), 2),
        (Sampling(1.0, top_p=0.75), 3),  # 0.4, 0.3: 0.7 is not enough
        (Sampling(1.0, top_p=0.69), 2),
        (Sampling(1.0, top_k=1, top_p=0.9), 1),
        (Sampling(1e-9), 1),
    ],
)
def test_tokens_are_drawn_as_often_as_they_should(sampling, allowed):
    draws, probability = 4000, np.array([0.3, 0.4, 0.05, 0.15, 0.1])
    given = jnp.broadcast_to(jnp.log(jnp.asarray(probability, jnp.float32)) + 5, (draws, 5))
    keys = jax.random.split(jax.random.key(0), draws)
    found = np.bincount(jax.jit(sample, static_argnames="sampling")(given, keys, jnp.arange(draws), sampling=sampling), minlength=5)
    wanted = np.where(np.argsort(np.argsort(-probability)) < allowed, probability ** (1 / max(sampling.temperature, 1e-2)), 0)
    wanted /= wanted.sum()
    assert (np.abs(found / draws - wanted) <= 5 * np.sqrt(wanted * (1 - wanted) / draws)).all()


def test_keys_differ_by_prompt_and_by_repetition():
    data = np.asarray(jax.random.key_data(keys_of(["a", "b", "a", ""], 0)))
    assert len({tuple(row) for row in data.tolist()}) == 4
    np.testing.assert_array_equal(jax.random.key_data(keys_of(["b"], 0))[0], data[1])


def test_pieces_hold_whole_characters_only():
    tokenizer = train_tokenizer(["plain text"], 280)
    text = "a \N{PARTY POPPER}\N{LATIN SMALL LETTER E WITH ACUTE} b"
    (ids,) = tokenizer.encode([text])
    pieces = TextPieces(tokenizer.decode)
    told = [pieces.add(int(token)) for token in ids]
    assert "".join(told) == text and told.count("") >= 4
    broken = TextPieces(tokenizer.decode)
    party = [int(token) for token in tokenizer.encode(["\N{PARTY POPPER}"])[0]]
    assert [broken.add(token) for token in party[:3]] == ["", "", ""]
    assert [broken.add(party[1]) for _ in range(20)].count("") < 20  # bytes that are no text are not held back for ever


@pytest.fixture
def no_cache(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "four rows " * 30], "and a context of 32 has no room for it and one more; shorten it or raise context"),
        (["--prompt", "", "--context", "0"], "context is 0; it must be a positive number of tokens"),
        (["--prompt", "", "--context", "1"], "a prompt has 1 tokens, and a context of 1 has no room"),
        (["--prompt", "", "--context", str(10**15)], "GiB for the caches of 1 sequence(s)"),
        (["--prompt", "", "--max-tokens", "32"], "max_tokens is 32, but after a prompt of 1 tokens a context of 32 has room for 31"),
        (["--prompt", "", "--max-tokens", "0"], "max_tokens is 0"),
        (["--prompt", "", "--temperature", "nan"], "temperature is nan"),
        (["--prompt", "", "--top-k", "-1"], "top_k is -1"),
        (["--prompt", "", "--top-p", "0"], "top_p is 0.0"),
        (["--prompt", "", "--seed", "-1"], "seed is -1"),
        (["--prompt"], "there is no prompt"),
    ],
)
def test_bad_options_get_one_message(run, opened, options, message, monkeypatch, capsys, no_cache):
    monkeypatch.setattr(Generator, "open", lambda folder, mesh: opened)
    before = sorted(run.rglob("*"))
    assert main(["generate", str(run), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", "there is no run in"),
        ("checkpoints", "holds no checkpoint"),
        ("tokenizer.json", "has no tokenizer.json: it was trained before runs kept their tokenizer"),
        ("engram.json", "engram.json"),
    ],
)
def test_what_a_folder_lacks_is_told(run, tmp_path, missing, message, capsys, no_cache):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / missing) if (copy / missing).is_dir() else (copy / missing).unlink()
    assert main(["generate", str(copy), "--prompt", "x"]) == 2
    assert message in capsys.readouterr().err


def test_the_command_prints_prompt_and_continuation(run, opened, monkeypatch, capsys, no_cache):
    monkeypatch.setattr(Generator, "open", lambda folder, mesh: opened)
    texts = opened.generate(PROMPTS, 6, sampling=GREEDY).texts
    assert main(["generate", str(run), "--prompt", *PROMPTS, "--max-tokens", "6", "--temperature", "0"]) == 0
    said = capsys.readouterr()
    assert said.out == "".join(f"{prompt}{text}\n\n" for prompt, text in zip(PROMPTS, texts))
    assert said.err.startswith("prefill: ") and "decode: 18 tokens" in said.err
    assert main(["generate", str(run), "--prompt", PROMPTS[1], "--seed", "1"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(PROMPTS[1]) and said.endswith("\n")


@pytest.mark.slow
def test_a_run_is_trained_and_continues_text_as_it_was_taught(tmp_path, monkeypatch, capsys, no_cache):
    """Words in a circle: after enough steps each is followed by its successor."""
    monkeypatch.setenv("MHC_JAX_CACHE", str(tmp_path / "cache"))
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text(" ".join(WORDS[(i + j) % len(WORDS)] for j in range(200)))
    changes = {
        "optimizer.learning_rate": 1e-2,
        "optimizer.warmup_steps": 2,
        "data.source": (f"{tmp_path}/*.txt",),
        "data.heldout_share": 0.2,
        "train.steps": 60,
        "train.eval_every": 60,
        "train.eval_sequences": 8,
        "train.checkpoint_every": 60,
    }
    train(override(CONFIG, changes), tmp_path / "run", say=lambda _: None)
    options = ["--max-tokens", "8", "--temperature", "0"]
    assert main(["generate", str(tmp_path / "run"), "--prompt", " ".join(WORDS[2:6]), *options]) == 0
    assert " ".join([*WORDS[2:], *WORDS[:2]]) in capsys.readouterr().out
