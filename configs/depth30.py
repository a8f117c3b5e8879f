"""The stability ablation where it belongs: at depth. Narrow enough for two CPU cores."""

from mhc_jax.config import AttentionConfig, Config, DataConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig


def depth30() -> Config:
    """Thirty narrow MLA + MoE layers, 60 sublayers as in the paper's 27B model, on the Python standard library's source text.

    Source: the depth of arXiv 2512.24880's 27B model (Table 5), whose Figures 3, 7 and 8 this config redraws; the width of a toy; float32.
    Chosen here: the learning rate is the plain residual's best of 7.5e-4, 1.5e-3, 3e-3 and 6e-3 after 200 steps; all variants share it.
    docs/depth30.md has the search (`mhc-jax ablate depth30_search`).
    Expect: HC's composite gain between 80,000 and 900,000 (three seeds), mHC's below 2; HC nevertheless with the lowest loss.
    Cost: 20 minutes for the four variants and one seed on two CPU cores that were busy with other work too.
    Command: mhc-jax ablate depth30 --seeds 3
    """
    return Config(
        name="depth30",
        model=ModelConfig(
            residual="mhc",
            vocab_size=1024,
            num_layers=30,
            dim=64,
            dense_layers=1,
            dense_dim=192,
            attention=AttentionConfig(num_heads=2, nope_dim=32, rope_dim=16, value_dim=32, kv_rank=32, query_block=128),
            moe=MoEConfig(num_experts=4, top_k=1, shared_experts=1, expert_dim=64),
            init_std=0.06,
            dtype="float32",
            remat="none",
            loss_chunk=128,
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=30),
        data=DataConfig(seq_len=128),
        train=TrainConfig(steps=300, batch_size=4, eval_every=25, eval_sequences=32, checkpoint_every=100),
    )
