"""DeepSeek Sparse Attention: DeepSeek-V3.2's continued training, and the recipe at a size for two CPU cores (docs/sparse_attention.md).

The published recipe is three runs, each beginning with the parameters of the one before: dense attention (`model.attention.sparse` None),
the indexer alone (`--model.attention.sparse.stage warmup`), sparse attention.
"""

import dataclasses

from mhc_jax.config import AttentionConfig, Config, DataConfig, ModelConfig, MoEConfig, OptimizerConfig, RopeConfig, TrainConfig
from mhc_jax.configs.large import v3_671b
from mhc_jax.sparse_config import SparseConfig


def deepseek_v32() -> Config:
    """DeepSeek-V3.2's sparse stage: 672B parameters, 128K tokens a sequence, 943.7B tokens.

    Source: arXiv 2512.02556, section 2.1 (stages, rates, steps, batches) and the released config.json (shapes). The plain residual,
    as published; `--residual mhc` is the switch. Its multi-token prediction layer is not part of this network.
    Expect: DeepSeek-V3.1's quality at a fraction of the attention cost beyond 10K tokens (its section 3); not run with this code.
    The warm-up before it: --model.attention.sparse.stage warmup --optimizer.learning-rate 1e-3 --train.steps 1000 --train.batch-size 16.
    Command: mhc-jax train deepseek_v32 --train.init-from RUN --mesh.fsdp 480 (a whole slice; see docs/sparse_attention.md)
    """
    v3 = v3_671b().model
    attention = dataclasses.replace(v3.attention, rope=RopeConfig(yarn_factor=40.0), sparse=SparseConfig())
    moe = dataclasses.replace(v3.moe, bias_rate=0.0)  # as in the last 500B tokens of DeepSeek-V3's own training
    return Config(
        name="deepseek_v32",
        model=dataclasses.replace(v3, attention=attention, moe=moe),
        optimizer=OptimizerConfig(learning_rate=7.3e-6, warmup_steps=0, decay_points=(1.0, 1.0), decay_factors=(1.0, 1.0)),
        data=DataConfig(seq_len=131_072),
        train=TrainConfig(steps=15_000, batch_size=480, eval_sequences=480),
    )


def dsa_laptop() -> Config:
    """Four small layers whose queries attend to 256 chosen keys of up to 512, trained from scratch as DeepSeek-V4.1 does.

    Chosen here: everything; the proportions are DeepSeek-V3.2's.
    Expect: 4.34 nats on held-out text at seed 0, 1.5 below its unigram entropy.
    Cost: near 2.8 seconds of CPU a step, a quarter of an hour on two idle cores.
    Command: mhc-jax train dsa_laptop, then mhc-jax generate runs/dsa_laptop-mhc-seed0 --prompt 'def '
    """
    return Config(
        name="dsa_laptop",
        model=ModelConfig(
            residual="mhc",
            vocab_size=1024,
            num_layers=4,
            dim=256,
            dense_layers=1,
            dense_dim=768,
            attention=AttentionConfig(
                num_heads=8,
                nope_dim=32,
                rope_dim=16,
                value_dim=32,
                kv_rank=64,
                q_rank=128,
                query_block=128,
                sparse=SparseConfig(index_heads=4, index_dim=32, top_k=256, query_chunk=128),
            ),
            moe=MoEConfig(num_experts=8, top_k=2, shared_experts=1, expert_dim=256),
            init_std=0.04,
            dtype="float32",
            remat="none",
            loss_chunk=128,
        ),
        optimizer=OptimizerConfig(learning_rate=1.5e-3, warmup_steps=30),
        data=DataConfig(seq_len=512),
        train=TrainConfig(steps=300, batch_size=4, eval_every=50, eval_sequences=32, checkpoint_every=100),
    )
