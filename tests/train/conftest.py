"""A corpus and a config so small that a run takes seconds."""

import random

import pytest

from mhc_jax.config import AttentionConfig, Config, DataConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig


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
    return Config(
        name="tiny",
        model=ModelConfig(
            residual="mhc",
            vocab_size=280,
            num_layers=2,
            dim=16,
            dense_layers=1,
            dense_dim=24,
            attention=AttentionConfig(num_heads=2, nope_dim=8, rope_dim=4, value_dim=8, kv_rank=8),
            moe=MoEConfig(num_experts=4, top_k=2, shared_experts=1, expert_dim=8),
            init_std=0.1,
            dtype="float32",
            remat="none",
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        data=DataConfig(seq_len=32, source=corpus, heldout_share=0.2),
        train=TrainConfig(steps=8, batch_size=8, eval_every=2, eval_sequences=8, checkpoint_every=2, keep_last=2, keep_best=1),
    )
