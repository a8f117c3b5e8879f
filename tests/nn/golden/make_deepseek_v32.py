"""Writes deepseek_v32.npz: what Hugging Face's DeepSeek-V3.2 computes with small random weights, for test_deepseek_v32.py.

    pip install "torch==2.13.0" "transformers==5.23.0"
    python tests/nn/golden/make_deepseek_v32.py

Neither package is needed by the library or its tests. All float arrays are float32, as the model computed them on a CPU:

    config                            the settings below, one JSON text
    weights/NAME                      a parameter or buffer of DeepseekV32ForCausalLM under its own name; linear weights are [out, in]
    INPUT/tokens, INPUT/logits        [B, S] and [B, S, vocab]; INPUT is `long` (S > index_topk) or `short` (S <= index_topk)
    INPUT/LAYER/x, INPUT/LAYER/out    what the attention of layer 0 or 1 was given and gave, [B, S, hidden]
    INPUT/LAYER/scores                the indexer's [B, S, S], -inf where not visible
    INPUT/LAYER/index, .../count      the chosen tokens, int32 [B, S, k], rising; the first `count` [B, S] are visible, the rest hold 0
"""

import functools
import json
from pathlib import Path

import numpy as np
import torch
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM

SETTINGS = {
    "vocab_size": 48,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 6,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "index_n_heads": 4,
    "index_head_dim": 16,
    "index_topk": 8,
    "max_position_embeddings": 64,
    # A ramp that keeps one pair, slows one down by the whole factor, and blends the two between.
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 100.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 4.0,
        "beta_slow": 0.1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}
LENGTHS = {"long": 40, "short": 8}
MARGIN = 3e-4  # standard deviations of the scores between a chosen one and the next: rounding must not decide what the file holds
HIDDEN = torch.finfo(torch.float32).min / 2  # the mask is added to the scores


def make_model(seed: int) -> DeepseekV32ForCausalLM:
    """Norms, biases and buffers differ from ones and zeros too, and nothing is so small that it would not show."""
    generator = torch.Generator().manual_seed(seed)
    model = DeepseekV32ForCausalLM(DeepseekV32Config(**SETTINGS, attn_implementation="eager")).float().eval()
    for name, value in model.state_dict().items():
        normal = torch.randn(value.shape, generator=generator)
        if name.endswith("norm.weight"):
            value.copy_(1 + 0.3 * normal)
        elif value.ndim == 1:
            value.copy_(0.3 * normal)
        elif name.endswith("embed_tokens.weight"):
            value.copy_(normal)
        else:
            value.copy_(normal * (1.5 * value.shape[-1] ** -0.5))
    return model


def record(attention: torch.nn.Module, into: dict[str, torch.Tensor]) -> None:
    """Keeps what an attention layer is given and gives, and what its indexer ranks."""
    indexer, topk = attention.indexer, torch.Tensor.topk

    def ranked(forward, *args, **kwargs):
        def recorded(scores, *a, **k):
            into["scores"] = scores.clone()
            return topk(scores, *a, **k)

        torch.Tensor.topk = recorded
        try:
            into["index"] = forward(*args, **kwargs)
        finally:
            torch.Tensor.topk = topk
        return into["index"]

    indexer.forward = functools.partial(ranked, indexer.forward)
    attention.register_forward_hook(lambda _, args, kwargs, out: into.update(x=kwargs["hidden_states"], out=out[0]), with_kwargs=True)


def as_selected(index: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rising, with zeros after the visible ones; short rows rank tokens that they do not see."""
    seen = np.isfinite(np.take_along_axis(scores, index.astype(np.int64), axis=-1))
    index = np.sort(np.where(seen, index, scores.shape[-1]), axis=-1)
    count = seen.sum(axis=-1)
    return np.where(np.arange(index.shape[-1]) < count[..., None], index, 0).astype(np.int32), count.astype(np.int32)


def margin(scores: np.ndarray, top_k: int) -> float:
    ranked = -np.sort(-scores[:, top_k:], axis=-1)  # of the queries that see more than they may choose
    return float(np.min(ranked[..., top_k - 1] - ranked[..., top_k]))


def compute(seed: int) -> dict[str, np.ndarray] | None:
    """The file's arrays; None where a choice is too close to call."""
    model, rng = make_model(seed), np.random.default_rng(seed)
    arrays = {"config": np.array(json.dumps(SETTINGS))} | {f"weights/{name}": value.numpy() for name, value in model.state_dict().items()}
    layers = [{} for _ in model.model.layers]
    for layer, into in zip(model.model.layers, layers):
        record(layer.self_attn, into)
    for kind, length in LENGTHS.items():
        tokens = rng.integers(0, SETTINGS["vocab_size"], (2, length)).astype(np.int32)
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens).long(), use_cache=False).logits
        arrays |= {f"{kind}/tokens": tokens, f"{kind}/logits": logits.numpy()}
        for number, kept in enumerate(layers):
            scores = np.where(kept["scores"].numpy() < HIDDEN, -np.inf, kept["scores"].numpy()).astype(np.float32)
            if length > SETTINGS["index_topk"] and margin(scores, SETTINGS["index_topk"]) < MARGIN * scores[scores > -np.inf].std():
                return None
            index, count = as_selected(kept["index"].numpy(), scores)
            here = {"x": kept["x"].numpy(), "out": kept["out"].numpy(), "scores": scores, "index": index, "count": count}
            arrays |= {f"{kind}/{number}/{name}": value for name, value in here.items()}
    return arrays


def main() -> None:
    seed, arrays = next((seed, arrays) for seed in range(1000) if (arrays := compute(seed)) is not None)
    path = Path(__file__).with_name("deepseek_v32.npz")
    np.savez_compressed(path, **arrays)
    print(f"{path}: seed {seed}, {len(arrays)} arrays, {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
