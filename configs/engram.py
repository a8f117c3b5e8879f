"""Engram's published sizes (arXiv 2601.07372, Table 5; DeepSeek-V4.1-Flash), and the paper's four models.

Taken from Table 5: layers, width, heads, experts, Engram's fields, vocabulary, sequence length, batch, steps, learning rate, weight decay,
Muon for the network and Adam with five times the learning rate for the tables, n. Inferred, because the paper leaves it open and it
reproduces its parameter counts within 0.3 % when input embedding and output head count once: expert width 1536, the dense feed-forward
(6 + 2) times that, full-rank queries. Not published and chosen here: warm-up and steps of the schedule, initial values.

`override(config, {"model.engram": ENGRAM["27b"]})` gives any other config such a memory.
"""

import dataclasses
from typing import Any

from mhc_jax.config import AttentionConfig, Config, DataConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig
from mhc_jax.engram_config import EngramConfig, TableConfig

ENGRAM: dict[str, EngramConfig] = {
    # arXiv 2601.07372, Table 5: "vocab" 2,262,400 (17.5 x 129,280) is where the search for each table's prime begins. The text calls the
    # layers 2 and 15 and counts from 1. Padding and crossing of documents as in the published demo code.
    "27b": EngramConfig(layers=(2, 15), layer_base=1, table_sizes=(2_262_400,) * 2, pad_id=2, cross_documents=True),
    "40b": EngramConfig(layers=(2, 15), layer_base=1, table_sizes=(7_239_680,) * 2, pad_id=2, cross_documents=True),
    # DeepSeek-V4.1-Flash, config.json: engram_layer_ids [1, 14], counted from 0; orders up to 4. No convolution, and momentum balanced by
    # Sinkhorn in the place of Adam, says its report.
    "v4.1-flash": EngramConfig(
        layers=(1, 14),
        table_sizes=(16_000_000,) * 3,
        orders=(2, 3, 4),
        pad_id=2,
        cross_documents=True,
        head_dim=256,
        conv=False,
        tables=TableConfig("sinkhorn"),
    ),
}


def _paper(name: str, *, experts: int, engram: EngramConfig | None = None, **changes: Any) -> Config:
    expert_dim = 1536
    model = ModelConfig(
        residual="mhc",
        vocab_size=129_280,
        num_layers=30,
        dim=2560,
        dense_layers=1,
        dense_dim=(6 + 2) * expert_dim,
        attention=AttentionConfig(num_heads=32),
        moe=MoEConfig(num_experts=experts, top_k=6, shared_experts=2, expert_dim=expert_dim),
        engram=engram,
    )
    return Config(
        name=name,
        model=dataclasses.replace(model, **changes),
        optimizer=OptimizerConfig(learning_rate=4.0e-4, kind="muon"),
        data=DataConfig(seq_len=4096),
        train=TrainConfig(steps=50_000, batch_size=1280, eval_sequences=256),
    )


def engram_27b() -> Config:
    """26.7B parameters, of which 5.8B in tables; 262B tokens.

    Expect: validation loss 1.622, 0.012 nats below `engram_moe_27b` at equal total and active parameters (paper, Table 1).
    Command: mhc-jax train engram_27b --mesh.fsdp 256
    """
    return _paper("engram_27b", experts=55, engram=ENGRAM["27b"])


def engram_40b() -> Config:
    """39.5B parameters, of which 18.5B in tables; 262B tokens.

    Expect: validation loss 1.610, with the gap to smaller tables still widening at the end (paper, Table 1).
    Command: mhc-jax train engram_40b --mesh.fsdp 256
    """
    return _paper("engram_40b", experts=55, engram=ENGRAM["40b"])


def engram_moe_27b() -> Config:
    """26.7B parameters without a memory: the baseline of `engram_27b`; 262B tokens.

    Expect: validation loss 1.634 (paper, Table 1).
    Command: mhc-jax train engram_moe_27b --mesh.fsdp 256
    """
    return _paper("engram_moe_27b", experts=72)


def engram_dense_4b() -> Config:
    """4.10B parameters, all active: the dense baseline; 262B tokens.

    Its feed-forward width is not published; 12,160 is the multiple of 128 that comes nearest the published total.
    Expect: validation loss 1.768 (paper, Table 1).
    Command: mhc-jax train engram_dense_4b --mesh.fsdp 64
    """
    return _paper("engram_dense_4b", experts=72, dense_layers=30, dense_dim=12_160)
