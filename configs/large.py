"""DeepSeek-V3 as published, and its shape widened to a trillion parameters with all three ideas on: for plans rather than for runs."""

import dataclasses

from mhc_jax.config import AttentionConfig, Config, DataConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig
from mhc_jax.configs.engram import ENGRAM
from mhc_jax.sparse_config import SparseConfig


def v3_671b() -> Config:
    """DeepSeek-V3's pre-training: 671B parameters, 36.6B active (37.6B with the input embedding), 14.8T tokens of 4K sequences.

    Source: arXiv 2412.19437 (sections 4.1 and 4.2) and the released config.json. The plain residual, as published. Left out: the
    multi-token prediction module (11.5B parameters of its own). Assumed, because a config cannot say it: the largest batch from the first
    step on (published: 3072 to 15,360 over the first 469B tokens), a step to a tenth of the learning rate in the middle of the published
    cosine (10T to 14.3T tokens) and one to 7.3e-6 for the last 167B, experts' biases moving to the end (published: not in the last 500B).
    Epsilons are those of the released code for norms, and this library's for the optimizer, whose moments are bfloat16 as published.
    Expect: 2.664M H800 hours at the published 38.9 % MFU (docs/economics.md); no loss is published. Not run with this code.
    Command: mhc-jax train v3_671b --mesh.fsdp 512 --data.source 'corpus/*.txt' --data.tokenizer tokenizer.json
    """
    return Config(
        name="v3_671b",
        model=ModelConfig(
            residual="residual",
            vocab_size=129_280,
            num_layers=61,
            dim=7168,
            dense_layers=3,
            dense_dim=18_432,
            attention=AttentionConfig(num_heads=128, q_rank=1536),
            moe=MoEConfig(num_experts=256, top_k=8, shared_experts=1, expert_dim=2048, num_groups=8, top_groups=4, routed_scaling=2.5),
            norm_eps=1e-6,
        ),
        optimizer=OptimizerConfig(learning_rate=2.2e-4, decay_points=(0.82, 0.9887), decay_factors=(0.1, 0.0332), moments="bfloat16"),
        data=DataConfig(seq_len=4096),
        train=TrainConfig(steps=235_244, batch_size=15_360, eval_sequences=512),
    )


def moe_1t() -> Config:
    """V3's shape widened to 0.99T parameters, 38.0B active, with mHC, Engram and sparse attention: all three ideas at once.

    No such model is published; names with v4 are kept for the real DeepSeek-V4. Assumed is all that is not DeepSeek-V3's (`v3_671b`): 304
    experts of its size; the tables of DeepSeek-V4.1-Flash (196.6B), 21 % of what is not active, where Engram's allocation law has its
    optimum (20 to 25 %; arXiv 2601.07372); mHC with n = 4 and V4's learned collapse; the indexer of DeepSeek-V3.2, trained from scratch as
    V4.1's is; V3's optimizer, AdamW, and not V4's Muon.
    Expect: no published loss; counted, 24 % more FLOPs a token than `v3_671b` at 4K tokens, where sparse attention costs more than it
    saves, 25 % fewer at 32K and 67 % fewer at 128K (docs/economics.md). Not run with this code.
    Command: mhc-jax train moe_1t --mesh.fsdp 512 --data.source 'corpus/*.txt' --data.tokenizer tokenizer.json
    """
    base = v3_671b()
    attention = dataclasses.replace(base.model.attention, sparse=SparseConfig())
    model = dataclasses.replace(
        base.model,
        residual="mhc",
        attention=attention,
        moe=dataclasses.replace(base.model.moe, num_experts=304),
        connections=dataclasses.replace(base.model.connections, collapse="learned"),
        engram=ENGRAM["v4.1-flash"],
    )
    return dataclasses.replace(base, name="moe_1t", model=model)
