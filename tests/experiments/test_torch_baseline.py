"""What of the PyTorch baseline runs without PyTorch: the shape that it is given, the conversation, and how it can fail."""

import sys
from pathlib import Path

import pytest

from mhc_jax import configs
from mhc_jax.config import fields, override
from mhc_jax.errors import UserError
from mhc_jax.experiments import torch_process
from mhc_jax.experiments.step_cost import measure, table
from mhc_jax.experiments.torch_baseline import transformers_config, trial
from mhc_jax.experiments.torch_process import torch_baseline
from mhc_jax.nn.count import count_parameters
from tests.small import BASE

STAND_IN = """
import json, sys
request = json.loads(sys.stdin.readline())
print(json.dumps({"parameters": request["shape"]["model.dim"], "threads": request["threads"]}), flush=True)
for step, _ in enumerate(sys.stdin):
    print(json.dumps({"seconds": 100.0 + step}), flush=True)
"""


def deepseek_v3_parameters(c):
    """Number of parameters of transformers' class, from its own names for the dimensions."""
    heads, width = c["num_attention_heads"], c["hidden_size"]
    key = c["qk_nope_head_dim"] + c["qk_rope_head_dim"]
    query = width * heads * key
    if c["q_lora_rank"] is not None:
        query = width * c["q_lora_rank"] + c["q_lora_rank"] + c["q_lora_rank"] * heads * key
    latent = width * (c["kv_lora_rank"] + c["qk_rope_head_dim"]) + c["kv_lora_rank"]
    attention = query + latent + c["kv_lora_rank"] * heads * (c["qk_nope_head_dim"] + c["v_head_dim"]) + heads * c["v_head_dim"] * width
    expert = 3 * width * c["moe_intermediate_size"]
    moe = (c["n_routed_experts"] + c["n_shared_experts"]) * expert + width * c["n_routed_experts"]
    dense = c["first_k_dense_replace"]
    feed_forward = dense * 3 * width * c["intermediate_size"] + (c["num_hidden_layers"] - dense) * moe
    return 2 * c["vocab_size"] * width + width + c["num_hidden_layers"] * (attention + 2 * width) + feed_forward


@pytest.mark.parametrize("name", ["laptop", "3b"])
def test_both_models_have_the_same_number_of_parameters(name):
    config = override(configs.get(name), {"model.residual": "residual", "model.attention.qk_norm": False})
    assert deepseek_v3_parameters(transformers_config(dict(fields(config)))) == count_parameters(config.model).total


@pytest.mark.slow
def test_torch_steps_in_turn_and_its_ratio_is_to_the_first_kind(tmp_path, monkeypatch):
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(torch_process, "SCRIPT", script)
    config = BASE
    with torch_baseline(Path(sys.executable), config) as torch:
        plain, torch_cost = measure(config, ["residual"], 2, torch)
    assert torch_cost.seconds == (102.0, 103.0)  # after the two steps of warm-up
    assert torch_cost.parameters == config.model.dim
    assert torch_cost.ratios == tuple(theirs / ours for theirs, ours in zip(torch_cost.seconds, plain.seconds))
    assert "| PyTorch | 102500 | 102000 |" in table([plain, torch_cost])


def test_an_interpreter_that_is_not_there_is_one_message(tmp_path):
    with pytest.raises(UserError, match="cannot be run"), torch_baseline(tmp_path / "python", BASE):
        pass


def test_an_environment_without_torch_is_one_message(tmp_path, monkeypatch):
    script = tmp_path / "no_torch.py"
    script.write_text("import a_module_that_is_not_installed")
    monkeypatch.setattr(torch_process, "SCRIPT", script)
    with pytest.raises(UserError, match="No module named 'a_module_that_is_not_installed'"), torch_baseline(Path(sys.executable), BASE):
        pass


def test_a_hopeless_setup_is_tried_for_three_steps():
    taken = []
    trial(lambda: taken.append(0) or 0.0, limit=-1.0)
    assert len(taken) == 3
