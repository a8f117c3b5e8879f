"""The stability ablation at a size that two CPU cores train in a minute or so a variant."""

from mhc_jax.config import AttentionConfig, Config, DataConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig


def laptop() -> Config:
    """Six small MLA + MoE layers on the Python standard library's source text.

    Source: the shape of arXiv 2512.24880's models (Table 5: leading dense layer, shared and routed experts, n = 4), scaled down; float32.
    Chosen here: the learning rate is the plain residual's best of 7.5e-4, 1.5e-3 and 3e-3 (5.05, 4.84, 5.07 nats, one seed); all variants
    share it.
    Expect: all variants about 1 nat below the unigram entropy; at seed 0 HC lowest (0.17 nats below the plain residual), mHC and identity
    HC level with each other (0.08 below). HC's composite gain near 10, mHC's near 1.
    Cost: under 6 minutes for the four variants on two CPU cores.
    Command: mhc-jax ablate laptop
    """
    return Config(
        name="laptop",
        model=ModelConfig(
            residual="mhc",
            vocab_size=1024,
            num_layers=6,
            dim=128,
            dense_layers=1,
            dense_dim=384,
            attention=AttentionConfig(num_heads=4, nope_dim=32, rope_dim=16, value_dim=32, kv_rank=64, query_block=128),
            moe=MoEConfig(num_experts=8, top_k=2, shared_experts=1, expert_dim=128),
            init_std=0.06,
            dtype="float32",
            remat="none",
            loss_chunk=128,
        ),
        optimizer=OptimizerConfig(learning_rate=1.5e-3, warmup_steps=30),
        data=DataConfig(seq_len=128),
        train=TrainConfig(steps=300, batch_size=8, eval_every=50, eval_sequences=64, checkpoint_every=100),
    )
