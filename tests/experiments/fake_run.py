"""A stand-in for training: writes the files of docs/results.md with plausible numbers, in milliseconds.

HC's residual matrices drift away from the identity so that their products grow; mHC's stay doubly stochastic; gains, distances and
composites are computed from the matrices, so that the arrays agree with each other.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from mhc_jax.config import AttentionConfig, Config, DataConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig, to_json, to_text

UNIGRAM_ENTROPY = 5.9
STEP_SECONDS = {"residual": 0.1, "hc": 0.17, "static_hc": 0.13, "mhc": 0.19, "identity_hc": 0.15}
FINAL_LOSS = {"residual": 3.9, "hc": 3.89, "static_hc": 3.91, "mhc": 3.915, "identity_hc": 3.885}


def tiny_config(*, steps: int = 40, eval_every: int = 10, layers: int = 3) -> Config:
    """A valid config that nobody trains."""
    return Config(
        name="tiny",
        model=ModelConfig(
            residual="mhc",
            vocab_size=4096,
            num_layers=layers,
            dim=32,
            dense_layers=1,
            dense_dim=64,
            attention=AttentionConfig(num_heads=2, nope_dim=8, rope_dim=4, value_dim=8, kv_rank=16),
            moe=MoEConfig(num_experts=4, top_k=2, shared_experts=1, expert_dim=16),
            dtype="float32",
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=5),
        data=DataConfig(seq_len=64),
        train=TrainConfig(steps=steps, batch_size=4, eval_every=eval_every, eval_sequences=4),
    )


def fake_train(config: Config, folder: Path, *, stop_after: int | None = None) -> dict[str, Any]:
    """Writes a run folder; with `stop_after` it is cut after that step, in the middle of a line, without a summary."""
    kind = config.model.residual
    rng = np.random.default_rng([config.train.seed, sum(map(ord, kind))])
    (folder / "stability").mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(to_json(config)))
    (folder / "config.txt").write_text(to_text(config))
    offset = FINAL_LOSS[kind] + 0.01 * rng.standard_normal()
    rows: list[dict[str, Any]] = []
    for step in range(config.train.steps + 1):
        if step:
            rows.append(_train_row(config, step, offset, rng))
        if step % config.train.eval_every == 0:
            arrays = stability_arrays(config, progress=step / config.train.steps, rng=rng)
            np.savez(folder / "stability" / f"{step:08d}.npz", **arrays)  # type: ignore[arg-type]
            rows.append(_eval_row(step, _loss(config, step, offset), arrays))
        if step == stop_after:
            break
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if stop_after is not None:
        (folder / "metrics.jsonl").write_text(text + '{"kind": "tr')
        raise KeyboardInterrupt
    (folder / "metrics.jsonl").write_text(text)
    summary = _summary(config, rows)
    (folder / "summary.json").write_text(json.dumps(summary))
    return summary


def stability_arrays(config: Config, *, progress: float, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """One evaluation's arrays (docs/results.md, stability); `progress` runs from 0 to 1."""
    kind, sublayers = config.model.residual, 2 * config.model.num_layers
    n = 1 if kind == "residual" else config.model.connections.streams
    res, logit_std, column_error = np.tile(np.eye(n), (sublayers, 1, 1)), np.full(sublayers, np.nan), np.zeros(sublayers)
    if kind == "mhc":
        logits = 4 * np.eye(n) + rng.standard_normal((sublayers, n, n)) * (
            0.05 + 2.5 * progress * np.arange(1, sublayers + 1)[:, None, None] / sublayers
        )
        logit_std = logits.std(axis=(1, 2))
        res = np.exp(logits)
        for _ in range(config.model.connections.sinkhorn_steps):
            res /= res.sum(axis=1, keepdims=True)
            res /= res.sum(axis=2, keepdims=True)
        column_error = np.abs(res.sum(axis=1) - 1).max(axis=1)
    elif kind in ("hc", "static_hc"):
        res = res + progress * (0.05 + 0.15 * rng.standard_normal((sublayers, n, n)))
        column_error = np.abs(res.sum(axis=1) - 1).max(axis=1)
    if n > 1:
        res[0] = np.eye(n)  # not trained: the streams are still equal
    composite, backward = [np.eye(n)], [np.eye(n)]
    for matrix in res:
        composite.append(matrix @ composite[-1])
    for matrix in res[::-1]:
        backward.append(backward[-1] @ matrix)
    forward_products, backward_products = np.stack(composite[1:]), np.stack(backward[1:][::-1])
    growth = 1 + np.arange(sublayers + 1)[:, None] * (0.2 + 0.3 * rng.random(n))
    learnable = np.ones((sublayers, 3))
    learnable[0, 0] = 0
    learnable[0, 2] = kind == "identity_hc"  # it has no H_res to keep out of training
    return {
        "gain_forward_single": np.abs(res.sum(axis=2)).max(axis=1),
        "gain_backward_single": np.abs(res.sum(axis=1)).max(axis=1),
        "gain_forward_composite": np.abs(forward_products.sum(axis=2)).max(axis=1),
        "gain_backward_composite": np.abs(backward_products.sum(axis=1)).max(axis=1),
        "row_error": np.abs(res.sum(axis=2) - 1).max(axis=1),
        "column_error": column_error,
        "distance_identity": np.linalg.norm(res - np.eye(n), axis=(1, 2)),
        "distance_uniform": np.linalg.norm(res - 1 / n, axis=(1, 2)),
        "logit_std": logit_std,
        "res": res,
        "res_composite": forward_products,
        "res_composite_rest": backward_products,
        "pre": rng.random((sublayers, n)),
        "post": 2 * rng.random((sublayers, n)),
        "stream_norm": growth,
        "stream_cosine": np.ones(sublayers + 1)
        if n == 1
        else 1 - (0.5 + 0.3 * rng.random()) * progress * np.arange(sublayers + 1) / sublayers,
        "max_attention_logit": 5 + rng.random(sublayers // 2),
        "learnable": learnable,
    }


def _loss(config: Config, step: int, offset: float) -> float:
    share = step / config.train.steps
    return 3.9 + (offset - 3.9) * share + 4.4 * float(np.exp(-6 * share)) + 0.1 * (offset - 3.9) * float(np.sin(9 * share))


def _train_row(config: Config, step: int, offset: float, rng: np.random.Generator) -> dict[str, Any]:
    grad_norm = float(np.exp(-0.5 + 0.3 * rng.standard_normal()) * (2 if config.model.residual == "hc" else 1))
    return {
        "kind": "train",
        "step": step,
        "loss": _loss(config, step, offset) + 0.05 * float(rng.standard_normal()),
        "balance_loss": 5e-4,
        "grad_norm": grad_norm,
        "clipped": int(grad_norm > config.optimizer.clip_norm),
        "learning_rate": config.optimizer.learning_rate,
        "max_attention_logit": 6.0,
        "expert_load_max": 1.3,
        "skipped": 0.0,
        "tokens": step * config.tokens_per_step,
        "seconds": STEP_SECONDS[config.model.residual],
    }


def _eval_row(step: int, loss: float, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    return {
        "kind": "eval",
        "step": step,
        "loss": loss,
        "max_attention_logit": 6.5,
        "gain_forward": float(arrays["gain_forward_composite"].max()),
        "gain_backward": float(arrays["gain_backward_composite"].max()),
        "row_error": float(arrays["row_error"].max()),
        "column_error": float(arrays["column_error"].max()),
    }


def _summary(config: Config, rows: list[dict[str, Any]]) -> dict[str, Any]:
    steps, evaluations = [row for row in rows if row["kind"] == "train"], [row for row in rows if row["kind"] == "eval"]
    best = min(evaluations, key=lambda row: row["loss"])
    kind, seconds = config.model.residual, STEP_SECONDS[config.model.residual]
    return {
        "name": config.name,
        "residual": kind,
        "seed": config.train.seed,
        "steps": config.train.steps,
        "tokens": steps[-1]["tokens"],
        "loss": evaluations[-1]["loss"],
        "best_loss": best["loss"],
        "best_step": best["step"],
        "unigram_entropy": UNIGRAM_ENTROPY,
        "parameters": 1_000_000 + (0 if kind == "residual" else 24_000),
        "active_parameters": 500_000,
        "connection_parameters": 0 if kind == "residual" else 24_000,
        "tokens_per_second": config.tokens_per_step / seconds,
        "step_seconds": seconds,
        "memory_bytes": 300 * 2**20,
        "first_step_seconds": 12.0,
        "compile_seconds": 10.0,
        "gain_forward": evaluations[-1]["gain_forward"],
        "gain_backward": evaluations[-1]["gain_backward"],
        "gain_forward_max": max(row["gain_forward"] for row in evaluations),
        "gain_backward_max": max(row["gain_backward"] for row in evaluations),
        "grad_norm": float(np.mean([row["grad_norm"] for row in steps[-max(1, len(steps) // 10) :]])),
        "clip_rate": float(np.mean([row["clipped"] for row in steps])),
        "loss_spikes": 0,
        "skipped_steps": 0,
        "rollbacks": 0,
        "data": {
            "fingerprint": "0123456789abcdef",
            "source": "stdlib",
            "train_tokens": 2_000_000,
            "heldout_tokens": 100_000,
            "unique_tokens": steps[-1]["tokens"],
            "epochs": steps[-1]["tokens"] / 2_000_000,
            "vocab_size": config.model.vocab_size,
            "tokenizer": "fedcba9876543210",
        },
        "platform": {"device": "cpu", "devices": 1, "jax": "0.10.2", "python": "3.11.9"},
    }
