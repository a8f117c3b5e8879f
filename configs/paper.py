"""The four set-ups of the mHC paper (arXiv 2512.24880, Table 5).

Taken from the table: layers, width, heads, expert width and counts, key-value rank, rotary dimension, norm epsilon, sequence length,
vocabulary, batch, steps, learning rate, betas, weight decay, warm-up, step schedule, n, alpha, t_max.

Inferred, because the table leaves it open and these choices reproduce its parameter counts within 0.3 %: queries are full-rank (no query
latent), the leading dense feed-forward is (6 + 2) times the expert width, embedding and head are separate matrices, "active" parameters
leave out the input embedding, mHC's own parameters are counted. Not published and chosen here: routed_scaling 1, bias_rate and
balance_loss of DeepSeek-V3 (arXiv 2412.19437), init_std of DeepSeek-V3, the initial H_res.

Data: name your own text with `--data.source 'corpus/*.txt' --data.tokenizer tokenizer.json`.
"""

from mhc_jax.config import AttentionConfig, Config, DataConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig


def _paper(name: str, *, layers: int, dim: int, heads: int, expert_dim: int, experts: int, batch: int, steps: int, lr: float) -> Config:
    return Config(
        name=name,
        model=ModelConfig(
            residual="mhc",
            vocab_size=129_280,
            num_layers=layers,
            dim=dim,
            dense_layers=1,
            dense_dim=(6 + 2) * expert_dim,
            attention=AttentionConfig(num_heads=heads),
            moe=MoEConfig(num_experts=experts, top_k=6, shared_experts=2, expert_dim=expert_dim),
            remat="attention",
        ),
        optimizer=OptimizerConfig(learning_rate=lr),
        data=DataConfig(seq_len=4096),
        train=TrainConfig(steps=steps, batch_size=batch, eval_sequences=256),
    )


def paper_3b() -> Config:
    """2.97B parameters, 612M active, 39.3B tokens.

    Expect: mHC ends about 0.029 nats below the plain residual (read off the paper's scaling figure).
    Command: mhc-jax ablate 3b --mesh.fsdp 64
    """
    return _paper("3b", layers=12, dim=1280, heads=16, expert_dim=896, experts=64, batch=320, steps=30_000, lr=8.6e-4)


def paper_9b() -> Config:
    """9.18B parameters, 1.66B active, 105B tokens.

    Expect: mHC ends about 0.023 nats below the plain residual (read off the paper's scaling figure).
    Command: mhc-jax ablate 9b --mesh.fsdp 128
    """
    return _paper("9b", layers=18, dim=1920, heads=24, expert_dim=1280, experts=64, batch=512, steps=50_000, lr=5.9e-4)


def paper_27b() -> Config:
    """27.0B parameters, 4.14B active, 262B tokens: the paper's stability ablation.

    Expect: mHC ends 0.021 nats below the plain residual; HC's composite gain peaks near 3000, mHC's near 1.6.
    Command: mhc-jax ablate 27b --mesh.fsdp 32 --mesh.data 4, on v5p:4x4x8 (docs/plan.md)
    """
    return _paper("27b", layers=30, dim=2560, heads=32, expert_dim=1536, experts=72, batch=1280, steps=50_000, lr=4.0e-4)


def paper_3b_1t() -> Config:
    """The 3B model on 1.05T tokens.

    Expect: mHC ends about 0.015 nats below the plain residual (read off the paper's figure).
    Command: mhc-jax train 3b_1t --mesh.fsdp 256
    """
    return _paper("3b_1t", layers=12, dim=1280, heads=16, expert_dim=896, experts=64, batch=2560, steps=100_000, lr=9.0e-4)
