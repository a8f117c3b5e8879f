"""summary.json: what a finished run says of itself. docs/results.md says what each entry is."""

import math
import platform
import sys
from typing import Any

import jax
import numpy as np

from mhc_jax.config import Config
from mhc_jax.data.prepared import Prepared
from mhc_jax.files import AnyPath
from mhc_jax.nn.count import count_parameters
from mhc_jax.train.metrics import read_lines
from mhc_jax.train.watch import count_spikes


def summary(
    config: Config,
    folder: AnyPath,
    data: Prepared,
    *,
    memory_bytes: int | None,
    compile_seconds: float,
    first_step_seconds: float | None,
    rollbacks: int,
) -> dict[str, Any]:
    """The entries, from the lines of metrics.jsonl, the data and the figures given."""
    lines = read_lines(folder / "metrics.jsonl")
    steps = [line for line in lines if line["kind"] == "train"]
    evals = [line for line in lines if line["kind"] == "eval"]
    best = min(evals, key=lambda line: math.inf if line["loss"] is None else line["loss"])
    count = count_parameters(config.model)
    step_seconds = float(np.median([line["seconds"] for line in steps[1:] or steps]))
    tail = [line["grad_norm"] for line in steps[-max(len(steps) // 10, 1) :] if not line["skipped"]]
    tokens = config.train.steps * config.tokens_per_step

    def largest(key: str) -> float | None:
        values = [line[key] for line in evals]
        return None if None in values else max(values)

    return {
        "name": config.name,
        "residual": config.model.residual,
        "seed": config.train.seed,
        "steps": config.train.steps,
        "tokens": tokens,
        "loss": evals[-1]["loss"],
        "best_loss": best["loss"],
        "best_step": best["step"],
        "unigram_entropy": data.heldout_unigram_entropy,
        "parameters": count.total,
        "active_parameters": count.active,
        "connection_parameters": count.connection,
        "tokens_per_second": config.tokens_per_step / step_seconds,
        "step_seconds": step_seconds,
        "memory_bytes": memory_bytes,
        "first_step_seconds": first_step_seconds,
        "compile_seconds": compile_seconds,
        "gain_forward": evals[-1]["gain_forward"],
        "gain_backward": evals[-1]["gain_backward"],
        "gain_forward_max": largest("gain_forward"),
        "gain_backward_max": largest("gain_backward"),
        "grad_norm": float(np.mean(tail)) if tail else None,
        "clip_rate": float(np.mean([line["clipped"] for line in steps])),
        "loss_spikes": count_spikes(math.nan if line["loss"] is None else line["loss"] for line in steps),
        "skipped_steps": round(sum(line["skipped"] for line in steps)),
        "rollbacks": rollbacks,
        "data": data.describe(tokens),
        "platform": {
            "device": jax.devices()[0].device_kind,
            "devices": config.mesh.devices,
            "jax": jax.__version__,
            "python": platform.python_version(),
            "system": sys.platform,
        },
    }
