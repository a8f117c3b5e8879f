"""A corpus and a config so small that a run takes seconds."""

import random

import pytest
from small import BASE

from mhc_jax.config import Config, override
from mhc_jax.train import loop


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A glob of text files in which words follow each other by rule, so that there is something to learn."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    words = ["stream", "residual", "mixes", "four", "rows", "sum", "to", "one"]
    for i in range(40):
        start = rng.randrange(len(words))
        (folder / f"{i:02}.txt").write_text(" ".join(words[(start + j) % len(words)] for j in range(200)))
    return f"{folder}/*.txt"


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    """Never the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MHC_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny(corpus: str) -> Config:
    changes = {
        "name": "tiny",
        "model.vocab_size": 280,
        "model.num_layers": 2,
        "optimizer.learning_rate": 1e-2,
        "optimizer.warmup_steps": 2,
        "data.seq_len": 32,
        "data.source": (corpus,),
        "data.heldout_share": 0.2,
        "train.steps": 8,
        "train.eval_every": 2,
        "train.eval_sequences": 8,
        "train.checkpoint_every": 2,
    }
    return override(BASE, changes)


@pytest.fixture(scope="session")
def compiled_once():
    """Runs share their compiled programs where their configs differ only in what no program depends on."""
    known = {}
    compile_programs = loop.compile_programs

    on_the_host = ("max_nonfinite_steps", "rollback_deviations", "max_rollbacks")

    def remembered(config, *args):
        key = override(config, {"train.checkpoint_every": config.train.eval_every, **{f"train.{name}": 8 for name in on_the_host}})
        if key not in known:
            known[key] = compile_programs(config, *args)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "compile_programs", remembered)
        yield
