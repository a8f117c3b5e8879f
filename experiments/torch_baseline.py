"""Training steps of Hugging Face's DeepSeek-V3 class in PyTorch, one at a time on request: the plain baseline of `bench --torch-python`.

A program of its own, for an environment with torch and transformers; it knows neither JAX nor this package. It talks in lines of JSON:

    stdin    {"shape": {"model.dim": 128, ...}, "threads": 2}     the fields of a config by their paths
    stdout   {"setup": "...", "tried": {...}, "parameters": N, "first_loss": L, "torch": "2.14.1", "transformers": "5.23.0"}
    stdin    anything                                             one line, one step
    stdout   {"seconds": S}

PyTorch gets its best plain chance: each implementation of attention and of the experts that transformers has, as it is and through
`torch.compile`, is tried for a few steps, and the one with the fastest step is kept. A step is forward, backward, clipping and fused AdamW.
"""

import json
import logging
import math
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

ATTENTION = ("sdpa", "eager")
EXPERTS = ("eager", "grouped_mm", "batched_mm")
TRIAL_STEPS = 8  # the fastest counts: compilation and warm-up do not
HOPELESS = 5  # a setup whose third step still takes so many times the fastest step of another is tried no longer


def transformers_config(shape: dict[str, Any]) -> dict[str, Any]:
    """Arguments of transformers' `DeepseekV3Config` for a model of the same shape."""
    return {
        "vocab_size": shape["model.vocab_size"],
        "hidden_size": shape["model.dim"],
        "intermediate_size": shape["model.dense_dim"],
        "moe_intermediate_size": shape["model.moe.expert_dim"],
        "num_hidden_layers": shape["model.num_layers"],
        "first_k_dense_replace": shape["model.dense_layers"],
        "num_attention_heads": shape["model.attention.num_heads"],
        "num_key_value_heads": shape["model.attention.num_heads"],
        "n_shared_experts": shape["model.moe.shared_experts"],
        "n_routed_experts": shape["model.moe.num_experts"],
        "num_experts_per_tok": shape["model.moe.top_k"],
        "n_group": shape["model.moe.num_groups"],
        "topk_group": shape["model.moe.top_groups"],
        "routed_scaling_factor": shape["model.moe.routed_scaling"],
        "norm_topk_prob": True,
        "kv_lora_rank": shape["model.attention.kv_rank"],
        "q_lora_rank": shape["model.attention.q_rank"],
        "qk_rope_head_dim": shape["model.attention.rope_dim"],
        "qk_nope_head_dim": shape["model.attention.nope_dim"],
        "v_head_dim": shape["model.attention.value_dim"],
        "max_position_embeddings": shape["data.seq_len"],
        "initializer_range": shape["model.init_std"],
        "rms_norm_eps": shape["model.norm_eps"],
        "rope_parameters": {"rope_type": "default", "rope_theta": shape["model.attention.rope.theta"]},
        "num_mtp_layers": 0,
        "use_cache": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def make_step(shape: dict[str, Any], attention: str, experts: str, compiled: bool) -> tuple[Callable[[], float], int]:
    """A function that takes one optimizer step and returns its loss in nats; and the number of parameters."""
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV3Config(**transformers_config(shape))
    config._attn_implementation = attention
    config._experts_implementation = experts
    model = DeepseekV3ForCausalLM(config).float().train()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": shape["optimizer.weight_decay"]}, {"params": vectors, "weight_decay": 0.0}],
        lr=shape["optimizer.learning_rate"],
        betas=(shape["optimizer.beta1"], shape["optimizer.beta2"]),
        eps=shape["optimizer.eps"],
        fused=True,
    )
    tokens = torch.randint(shape["model.vocab_size"], (shape["train.batch_size"], shape["data.seq_len"]))
    forward = torch.compile(model) if compiled else model

    def step() -> float:
        loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), shape["optimizer.clip_norm"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step, sum(p.numel() for p in model.parameters())


def timed(step: Callable[[], float]) -> float:
    """Seconds that one step takes."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def trial(step: Callable[[], float], limit: float) -> float:
    """Seconds of the fastest of `TRIAL_STEPS` steps, or of three if the third takes more than `limit`."""
    times = [timed(step) for _ in range(3)]
    if times[-1] <= limit:
        times += [timed(step) for _ in range(TRIAL_STEPS - 3)]
    return min(times)


def best_setup(shape: dict[str, Any]) -> tuple[tuple[str, str, bool], dict[str, float | str]]:
    """The fastest (attention, experts, compiled), and the seconds of its fastest step, or the error, of everything tried."""
    tried: dict[str, float | str] = {}
    seconds: dict[tuple[str, str, bool], float] = {}
    for compiled in (False, True):
        for attention in ATTENTION:
            for experts in EXPERTS:
                name = describe(attention, experts, compiled)
                try:
                    step, _ = make_step(shape, attention, experts, compiled)
                    fastest = trial(step, HOPELESS * min(seconds.values(), default=math.inf))
                except Exception as error:  # whatever a setup fails with, the others can still run; it is reported
                    tried[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}" if str(error) else type(error).__name__
                    continue
                seconds[attention, experts, compiled] = tried[name] = fastest
    return min(seconds, key=lambda setup: seconds[setup]), tried


def describe(attention: str, experts: str, compiled: bool) -> str:
    """What a setup is called in reports."""
    return f"{'torch.compile' if compiled else 'eager mode'}, attention {attention}, experts {experts}"


def main() -> None:
    """Serves steps until stdin ends."""
    import torch
    import transformers

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    request = json.loads(sys.stdin.readline())
    torch.set_num_threads(request["threads"])
    setup, tried = best_setup(request["shape"])
    step, parameters = make_step(request["shape"], *setup)
    answer = {
        "setup": describe(*setup),
        "tried": tried,
        "parameters": parameters,
        "first_loss": step(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(json.dumps(answer), flush=True)
    for _ in sys.stdin:
        print(json.dumps({"seconds": timed(step)}), flush=True)


if __name__ == "__main__":
    main()
