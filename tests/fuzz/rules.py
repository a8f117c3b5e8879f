"""What every config field may hold, written down a second time and without looking at the code that checks it.

`valid` is the oracle of the config and command-line cases. A field that is missing here makes the tests fail.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Rule = Callable[[Any], bool]


def whole(low: int, high: int = 2**31 - 1) -> Rule:
    return lambda v: type(v) is int and low <= v <= high


def real(low: float, high: float = math.inf, *, above: bool = False, below: bool = False) -> Rule:
    """Between the bounds, themselves excluded with `above` and `below`; and float32 holds it as what it is."""

    def rule(v: Any) -> bool:
        if type(v) not in (int, float) or v != v or abs(v) > float(np.finfo(np.float32).max):
            return False
        if v != 0 and abs(v) < float(np.finfo(np.float32).tiny):
            return False
        return low <= v <= high and not (above and v == low) and not (below and v == high)

    return rule


def choice(*values: str) -> Rule:
    return lambda v: type(v) is str and v in values


def text(v: Any) -> bool:
    return type(v) is str and v != "" and "\0" not in v and not any("\ud800" <= c <= "\udfff" for c in v)


def optional(rule: Rule) -> Rule:
    return lambda v: v is None or rule(v)


def several(rule: Rule, least: int = 0, most: int = 10**9) -> Rule:
    return lambda v: type(v) is tuple and least <= len(v) <= most and all(rule(x) for x in v)


def name(v: Any) -> bool:
    return text(v) and len(v) <= 100 and v not in (".", "..") and not set(v) & set("/\\\n\r")


positive, share = real(0, above=True), real(0, 1, above=True, below=True)

FIELDS: dict[str, Rule] = {
    "name": name,
    "model.residual": choice("residual", "hc", "static_hc", "mhc", "identity_hc", "mhc_lite", "kromhc"),
    "model.vocab_size": whole(1),
    "model.num_layers": whole(1),
    "model.dim": whole(1),
    "model.dense_layers": whole(0),
    "model.dense_dim": whole(0),
    "model.attention.num_heads": whole(1),
    "model.attention.nope_dim": whole(1),
    "model.attention.rope_dim": whole(2),
    "model.attention.value_dim": whole(1),
    "model.attention.kv_rank": whole(1),
    "model.attention.q_rank": optional(whole(1)),
    "model.attention.qk_norm": lambda v: type(v) is bool,
    "model.attention.query_block": whole(1),
    "model.attention.sparse": lambda v: v is None,
    "model.attention.rope.theta": real(1, above=True),
    "model.attention.rope.yarn_factor": real(1),
    "model.attention.rope.original_length": whole(1),
    "model.attention.rope.beta_fast": positive,
    "model.attention.rope.beta_slow": positive,
    "model.attention.rope.mscale": real(0),
    "model.moe.num_experts": whole(1),
    "model.moe.top_k": whole(1),
    "model.moe.shared_experts": whole(0),
    "model.moe.expert_dim": whole(1),
    "model.moe.num_groups": whole(1),
    "model.moe.top_groups": whole(1),
    "model.moe.routed_scaling": positive,
    "model.moe.bias_rate": real(0),
    "model.moe.balance_loss": real(0),
    "model.connections.streams": whole(1, 8),
    "model.connections.sinkhorn_steps": whole(1, 1000),
    "model.connections.gate_init": real(-math.inf),
    "model.connections.res_diagonal": real(-math.inf),
    "model.connections.collapse": choice("mean", "sum", "learned"),
    "model.engram": lambda v: v is None,
    "model.norm_eps": positive,
    "model.init_std": positive,
    "model.dtype": choice("float32", "bfloat16"),
    "model.remat": choice("none", "streams", "matmuls", "attention", "full"),
    "model.loss_chunk": whole(1),
    "optimizer.learning_rate": positive,
    "optimizer.kind": choice("adamw", "muon"),
    "optimizer.moments": choice("float32", "bfloat16"),
    "optimizer.warmup_steps": whole(0),
    "optimizer.decay_points": several(real(0, 1, above=True), 2, 2),
    "optimizer.decay_factors": several(real(0, 1), 2, 2),
    "optimizer.beta1": real(0, 1, below=True),
    "optimizer.beta2": real(0, 1, below=True),
    "optimizer.eps": positive,
    "optimizer.weight_decay": real(0),
    "optimizer.clip_norm": positive,
    "data.seq_len": whole(1),
    "data.source": several(text, 1),
    "data.weights": several(positive),
    "data.text_field": text,
    "data.max_bad_records": whole(0),
    "data.tokenizer": optional(text),
    "data.heldout_share": share,
    "data.read_threads": whole(1, 1024),
    "data.workers": whole(0, 1024),
    "train.steps": whole(1),
    "train.batch_size": whole(1),
    "train.microbatches": whole(1),
    "train.seed": whole(0),
    "train.init_from": optional(text),
    "train.eval_every": whole(1),
    "train.eval_sequences": whole(1),
    "train.checkpoint_every": whole(1),
    "train.keep_last": whole(1),
    "train.keep_best": whole(0),
    "train.max_nonfinite_steps": whole(1),
    "train.rollback_deviations": real(0),
    "train.max_rollbacks": whole(0),
    "mesh.data": whole(1),
    "mesh.fsdp": whole(1),
    "mesh.expert": whole(1),
    "mesh.context": whole(1),
    "mesh.tensor": whole(1),
}

# Instead of `model.engram`, where a config has it.
ENGRAM: dict[str, Rule] = {
    "model.engram.layers": several(whole(0), 1),
    "model.engram.table_sizes": several(whole(3), 1),
    "model.engram.orders": several(whole(2, 8), 1),
    "model.engram.heads": whole(1, 64),
    "model.engram.layer_base": whole(0, 1),
    "model.engram.seed": whole(0),
    "model.engram.pad_id": optional(whole(0)),
    "model.engram.compression": lambda v: type(v) is bool,
    "model.engram.cross_documents": lambda v: type(v) is bool,
    "model.engram.head_dim": whole(1),
    "model.engram.conv": lambda v: type(v) is bool,
    "model.engram.tables.optimizer": choice("adam", "row_second_moment", "sinkhorn"),
    "model.engram.tables.learning_rate_factor": positive,
    "model.engram.tables.init_std": positive,
    "model.engram.tables.capacity": positive,
    "model.engram.tables.placement": choice("device", "host"),
    "model.engram.tables.hot_rows": whole(0),
}

# Instead of `model.attention.sparse`, where a config has it.
SPARSE: dict[str, Rule] = {
    "model.attention.sparse.stage": choice("warmup", "sparse"),
    "model.attention.sparse.index_heads": whole(1),
    "model.attention.sparse.index_dim": whole(1),
    "model.attention.sparse.top_k": whole(1),
    "model.attention.sparse.granularity": choice("token", "page"),
    "model.attention.sparse.query_chunk": whole(1),
}


def known_fields(values: Mapping[str, Any]) -> set[str]:
    """The paths that a config with these has: of a group that may be None either the group or its fields."""
    known = set(FIELDS)
    for group, own in (("model.engram", ENGRAM), ("model.attention.sparse", SPARSE)):
        known = known if group in values else known - {group} | set(own)
    return known


def invalid_fields(values: Mapping[str, Any]) -> list[str]:
    """Fields whose value is wrong whatever the others are."""
    return [path for path, value in values.items() if not (FIELDS | ENGRAM | SPARSE)[path](value)]


def broken_pairs(v: Mapping[str, Any]) -> list[str]:
    """What does not fit together, of values that are right one by one."""
    moe, rope = "model.moe.", "model.attention.rope."
    experts, groups, chosen = v[moe + "num_experts"], v[moe + "num_groups"], v[moe + "top_groups"]
    batch, parts, shards = v["train.batch_size"], v["train.microbatches"], v["mesh.data"] * v["mesh.fsdp"] * v["mesh.expert"]
    across, tensor = v["mesh.context"] * v["mesh.tensor"], v["mesh.tensor"]
    routed = v["model.dense_layers"] < v["model.num_layers"]
    rules = {
        "coefficients a token": {"mhc_lite": 6, "kromhc": 8}.get(v["model.residual"], 8) >= v["model.connections.streams"]
        and (v["model.residual"], v["model.connections.streams"]) != ("kromhc", 7),
        "dense layers": v["model.dense_layers"] <= v["model.num_layers"],
        "dense width": v["model.dense_layers"] == 0 or v["model.dense_dim"] > 0,
        "rotary pairs": v["model.attention.rope_dim"] % 2 == 0,
        "rotations": v[rope + "beta_slow"] <= v[rope + "beta_fast"],
        "groups": experts % groups == 0 and chosen <= groups,
        "experts": experts % groups != 0 or v[moe + "top_k"] <= experts // groups * chosen,
        "query blocks": math.ceil(v["data.seq_len"] / v["model.attention.query_block"]) <= 4096,
        "microbatches": batch % parts == 0,
        "shards of the batch": batch % parts != 0 or (batch // parts) % shards == 0,
        "shards of the evaluation": v["train.eval_sequences"] % shards == 0,
        "shards of the width": v["model.dim"] % v["mesh.fsdp"] == 0,
        "shards of sequences": v["data.seq_len"] % across == 0,
        "shards of heads": v["model.attention.num_heads"] % across == 0,
        "shards of the vocabulary": v["model.vocab_size"] % tensor == 0,
        "shards of the dense width": v["model.dense_layers"] == 0 or v["model.dense_dim"] % tensor == 0,
        "shards of experts": not routed or experts % (v["mesh.expert"] * tensor) == 0,
        "shards of experts' width": not routed or v[moe + "expert_dim"] % v["mesh.fsdp"] == 0,
        "shards of the shared width": not routed or v[moe + "shared_experts"] * v[moe + "expert_dim"] % tensor == 0,
        "evaluations at checkpoints": v["train.checkpoint_every"] % v["train.eval_every"] == 0,
        "decay points": v["optimizer.decay_points"][0] <= v["optimizer.decay_points"][1],
        "decay factors": v["optimizer.decay_factors"][0] >= v["optimizer.decay_factors"][1],
        "weights": not v["data.weights"] or len(v["data.weights"]) == len(v["data.source"]),
        "sources": len(set(v["data.source"])) == len(v["data.source"]),
        **(_engram_pairs(v) if "model.engram.layers" in v else {}),
        **(_sparse_pairs(v) if "model.attention.sparse.stage" in v else {}),
    }
    return [what for what, holds in rules.items() if not holds]


def _sparse_pairs(v: Mapping[str, Any]) -> dict[str, bool]:
    part = {path.rpartition(".")[2]: v[path] for path in SPARSE}
    by_pages = part["granularity"] == "page"
    return {
        "a query latent": v["model.attention.q_rank"] is not None,
        "keys that are products of the latent": not v["model.attention.qk_norm"],
        "rotated dimensions of the indexer": v["model.attention.rope_dim"] <= part["index_dim"],
        "shards of index heads": part["index_heads"] % v["mesh.tensor"] == 0,
        "shards of pages": not by_pages or v["data.seq_len"] % (64 * v["mesh.context"]) == 0,
        "keys to choose from": part["top_k"] <= v["data.seq_len"],
        "whole pages": not by_pages or (part["top_k"] % 64 == 0 and part["query_chunk"] % 64 == 0),
        "frozen tables": part["stage"] == "sparse" or v.get("model.engram.tables.placement") != "host",
    }


def _engram_pairs(v: Mapping[str, Any]) -> dict[str, bool]:
    part = {path.rpartition(".")[2]: v[path] for path in ENGRAM}
    across = v["mesh.context"] * v["mesh.tensor"]
    layers, orders, sizes, base, pad = (part[name] for name in ("layers", "orders", "table_sizes", "layer_base", "pad_id"))
    return {
        "rising layers": all(a < b for a, b in itertools.pairwise(layers)),
        "rising orders": all(a < b for a, b in itertools.pairwise(orders)),
        "layers of the model": all(base <= layer < v["model.num_layers"] + base for layer in layers),
        "a size for each order": len(sizes) == len(orders),
        "rows": part["heads"] * sum(sizes) < 2**31,
        "padding token": pad is None or pad < v["model.vocab_size"],
        "halo of the convolution": not part["conv"] or across == 1 or v["data.seq_len"] // across >= 9,
        "dilation of the convolution": not part["conv"] or orders[-1] == 3,
        "hot rows": part["hot_rows"] == 0 or (part["placement"] == "host" and part["hot_rows"] <= part["heads"] * sum(sizes)),
        "optimizer on the host": part["placement"] == "device" or part["optimizer"] != "sinkhorn",
    }


def problems(values: Mapping[str, Any]) -> list[str]:
    """All that is wrong with the values of a config; none where it must be accepted."""
    return invalid_fields(values) or broken_pairs(values)
