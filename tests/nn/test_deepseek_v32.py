"""Sparse attention, and the whole decoder, against what Hugging Face's DeepSeek-V3.2 computed (golden/make_deepseek_v32.py)."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import dsa as oracle
from oracles import rope as rope_oracle
from small import relative, small

from mhc_jax.config import AttentionConfig, ModelConfig, MoEConfig, RopeConfig
from mhc_jax.nn import indexer
from mhc_jax.nn.decoder import Decoder, logits
from mhc_jax.nn.mla import MLA, LatentCache
from mhc_jax.nn.rotary import rotate
from mhc_jax.sparse_config import SparseConfig

LAYERS = range(2)


@cache
def golden() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / "golden" / "deepseek_v32.npz") as file:
        return dict(file)


@cache
def settings() -> dict[str, Any]:
    return json.loads(str(golden()["config"]))


def recorded(kind: str, layer: int, *names: str) -> list[np.ndarray]:
    return [golden()[f"{kind}/{layer}/{name}"] for name in names]


def config(sparse: bool = False) -> ModelConfig:
    s = settings()
    r = s["rope_parameters"]
    rope = RopeConfig(r["rope_theta"], r["factor"], r["original_max_position_embeddings"], r["beta_fast"], r["beta_slow"], r["mscale"])
    return small(
        residual="residual",
        vocab_size=s["vocab_size"],
        num_layers=s["num_hidden_layers"],
        dim=s["hidden_size"],
        dense_layers=s["first_k_dense_replace"],
        dense_dim=s["intermediate_size"],
        norm_eps=1e-6,
        attention=AttentionConfig(
            num_heads=s["num_attention_heads"],
            nope_dim=s["qk_nope_head_dim"],
            rope_dim=s["qk_rope_head_dim"],
            value_dim=s["v_head_dim"],
            kv_rank=s["kv_lora_rank"],
            q_rank=s["q_lora_rank"],
            query_block=16,
            rope=rope,
            sparse=SparseConfig(index_heads=s["index_n_heads"], index_dim=s["index_head_dim"], top_k=s["index_topk"], query_chunk=16)
            if sparse
            else None,
        ),
        moe=MoEConfig(
            num_experts=s["n_routed_experts"],
            top_k=s["num_experts_per_tok"],
            shared_experts=s["n_shared_experts"],
            expert_dim=s["moe_intermediate_size"],
            num_groups=s["n_group"],
            top_groups=s["topk_group"],
            routed_scaling=s["routed_scaling_factor"],
        ),
    )


# Their parameters under our names. Their linear weights are [out, in].


def weight(layer: int, name: str) -> np.ndarray:
    return golden()[f"weights/model.layers.{layer}.{name}"]


def of_attention(layer: int) -> dict[str, np.ndarray]:
    a = config().attention
    own = lambda name: weight(layer, f"self_attn.{name}.weight")  # noqa: E731
    return {
        "query_down": own("q_a_proj").T,
        "query_norm": own("q_a_layernorm"),
        "query_up": own("q_b_proj").T.reshape(a.q_rank, a.num_heads, a.nope_dim + a.rope_dim),
        "latent": own("kv_a_proj_with_mqa").T,
        "latent_norm": own("kv_a_layernorm"),
        "expand": own("kv_b_proj").T.reshape(a.kv_rank, a.num_heads, a.nope_dim + a.value_dim),
        "out": own("o_proj").T.reshape(a.num_heads, a.value_dim, -1),
    }


def of_indexer(layer: int) -> dict[str, np.ndarray]:
    own = lambda name: weight(layer, f"self_attn.indexer.{name}")  # noqa: E731
    return {
        "query": own("wq_b.weight").T.reshape(-1, settings()["index_n_heads"], settings()["index_head_dim"]),
        "key": own("wk.weight").T,
        "key_norm": own("k_norm.weight"),
        "key_norm_bias": own("k_norm.bias"),
        "weight": own("weights_proj.weight").T,
    }


def of_swiglu(layer: int, name: str) -> dict[str, np.ndarray]:
    gate, up, down = (weight(layer, f"{name}.{part}_proj.weight").T for part in ("gate", "up", "down"))
    return {"inner": np.concatenate([gate, up], axis=1), "out": down}


def of_experts(layer: int) -> dict[str, np.ndarray]:
    gate_up, down = (weight(layer, f"mlp.experts.{part}_proj").swapaxes(1, 2) for part in ("gate_up", "down"))
    return {"router": weight(layer, "mlp.gate.weight").T, "inner": gate_up, "out": down}


def filled(module: Any, values: dict[str, np.ndarray], layers: tuple[int, ...] = ()) -> Any:
    """The module with these parameters, in their places; `layers` is (1,) for a stack of one layer."""
    for name, value in values.items():
        assert getattr(module, name).shape == layers + value.shape, name
        setattr(module, name, jnp.asarray(value.reshape(layers + value.shape)))
    return module


def attention(layer: int, sparse: bool) -> MLA:
    module = filled(jax.eval_shape(lambda: MLA(config(sparse), jax.random.key(0))), of_attention(layer))
    if sparse:
        filled(module.indexer, of_indexer(layer))
    return module


def decoder(sparse: bool) -> tuple[Decoder, jax.Array]:
    """Their model as ours, and its router biases."""
    model = jax.eval_shape(lambda: Decoder(config(sparse), jax.random.key(0)))  # shapes alone: no parameter can stay as it was
    for number, layer in enumerate((model.dense_layers, model.moe_layers)):
        filled(layer.attention, of_attention(number), (1,))
        if sparse:
            filled(layer.attention.indexer, of_indexer(number), (1,))
        norms = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
        filled(layer, {ours: weight(number, f"{theirs}.weight") for ours, theirs in norms.items()}, (1,))
    filled(model.dense_layers.ffn, of_swiglu(0, "mlp"), (1,))
    filled(model.moe_layers.ffn, of_experts(1), (1,))
    filled(model.moe_layers.ffn.shared, of_swiglu(1, "mlp.shared_experts"), (1,))
    ends = {"embedding": "model.embed_tokens", "final_norm": "model.norm", "unembed": "lm_head"}
    values = {ours: golden()[f"weights/{theirs}.weight"] for ours, theirs in ends.items()}
    filled(model, values | {"unembed": values["unembed"].T})
    return model, jnp.asarray(weight(1, "mlp.gate.e_score_correction_bias"))[None]


def where(length: int) -> tuple[jax.Array, jax.Array]:
    """Positions and segment ids of two sequences of one document each."""
    return jnp.broadcast_to(jnp.arange(length)[None], (2, length)), jnp.ones((2, length), jnp.int32)


# The formula, in float64 NumPy.


def by_the_formula(kind: str, layer: int, **changes: Any) -> tuple[np.ndarray, np.ndarray, list[list[np.ndarray]]]:
    """Output, scores and choices of both sequences."""
    a, x = config().attention, recorded(kind, layer, "x")[0].astype(np.float64)
    r, length = a.rope, x.shape[1]
    known = {
        "nope": a.nope_dim,
        "rope": a.rope_dim,
        "kv_rank": a.kv_rank,
        "eps": 1e-6,
        "frequencies": rope_oracle.yarn_frequencies(a.rope_dim, r.theta, r.yarn_factor, r.original_length, r.beta_fast, r.beta_slow),
        "temperature": (0.1 * r.mscale * np.log(r.yarn_factor) + 1) ** 2,
        "top_k": settings()["index_topk"],
    }
    both = [
        oracle.dsa(row, of_attention(layer), of_indexer(layer), np.arange(length), oracle.causal(np.ones(length)), **(known | changes))
        for row in x
    ]
    out, scores, chosen = zip(*both)
    return np.stack(out), np.stack(scores), list(chosen)


def same_choices(chosen: list[list[np.ndarray]], kind: str, layer: int) -> bool:
    index, count = recorded(kind, layer, "index", "count")
    return all(np.array_equal(own, index[at][: count[at]]) for at in np.ndindex(count.shape) for own in [chosen[at[0]][at[1]]])


@pytest.mark.parametrize("kind", ["long", "short"])
@pytest.mark.parametrize("layer", LAYERS)
def test_the_formula_gives_their_scores_choices_and_output(kind, layer):
    out, scores, chosen = by_the_formula(kind, layer)
    theirs_scores, theirs_out = recorded(kind, layer, "scores", "out")
    seen = theirs_scores > -np.inf
    assert np.array_equal(seen, scores > -np.inf)
    assert relative(scores[seen], theirs_scores[seen]) < 1e-5
    # No choice hangs on rounding.
    assert min(oracle.margin(row, settings()["index_topk"]) for row in scores) > 10 * np.abs(scores[seen] - theirs_scores[seen]).max()
    assert same_choices(chosen, kind, layer)
    assert relative(out, theirs_out) < 1e-5


WRONG = {
    "neighbouring pairs turned in the indexer": {"turn": rope_oracle.rotate},
    "every visible key attended to": {"top_k": None},
    "no temperature": {"temperature": 1.0},
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("layer", LAYERS)
def test_the_file_tells_a_wrong_formula(wrong, layer):
    out, _, chosen = by_the_formula("long", layer, **WRONG[wrong])
    assert relative(out, recorded("long", layer, "out")[0]) > 1e-2
    assert same_choices(chosen, "long", layer) == (wrong == "no temperature")


def test_up_to_top_k_tokens_the_indexers_rotation_shows_in_the_scores_alone():
    out, scores, _ = by_the_formula("short", 0, turn=rope_oracle.rotate)
    theirs_scores, theirs_out = recorded("short", 0, "scores", "out")
    seen = theirs_scores > -np.inf
    assert relative(out, theirs_out) < 1e-5
    assert relative(scores[seen], theirs_scores[seen]) > 1e-2


# The library.


def attended(module: MLA, x: np.ndarray) -> jax.Array:
    return jax.jit(lambda m, x: m(x, *where(x.shape[1]))[0])(module, x)


@pytest.mark.parametrize("layer", LAYERS)
def test_dense_attention_equals_theirs_for_the_first_top_k_tokens(layer):
    module, top_k = attention(layer, sparse=False), settings()["index_topk"]
    for kind in ("short", "long"):
        x, out = recorded(kind, layer, "x", "out")
        ours = attended(module, x)
        assert relative(ours[:, :top_k], out[:, :top_k]) < 1e-5
    assert relative(ours[:, top_k:], out[:, top_k:]) > 1e-2  # of the long input


@pytest.mark.parametrize("layer", LAYERS)
def test_sparse_attention_equals_theirs(layer):
    x, out = recorded("long", layer, "x", "out")
    assert relative(attended(attention(layer, sparse=True), x), out) < 1e-5


def test_the_indexer_rotated_as_the_attention_is_misses_theirs(monkeypatch):
    monkeypatch.setattr(indexer, "rotate", lambda x, positions, rope, *, interleaved: rotate(x, positions, rope))
    x, out = recorded("long", 0, "x", "out")
    assert relative(attended(attention(0, sparse=True), x), out) > 1e-2


def test_decoding_five_tokens_at_a_time_gives_theirs():
    """From a cache with room for more than there are."""
    module, (x, out) = attention(0, sparse=True), recorded("long", 0, "x", "out")
    cache, step = LatentCache.empty(config(sparse=True).attention, 2, 48, jnp.dtype("float32")), jax.jit(lambda m, *args: m.decode(*args))
    positions, parts = where(x.shape[1])[0], []
    for at in range(0, x.shape[1], 5):
        part, cache = step(module, x[:, at : at + 5], positions[:, at : at + 5], cache)
        parts.append(part)
    assert relative(jnp.concatenate(parts, axis=1), out) < 1e-5


@pytest.mark.parametrize(("kind", "sparse"), [("short", False), ("long", True)])
def test_the_decoder_gives_their_logits(kind, sparse):
    """Dense for as many tokens as would all be chosen."""
    model, bias = decoder(sparse)
    ours = jax.jit(lambda m, tokens: logits(m, tokens, *where(tokens.shape[1]), bias))(model, golden()[f"{kind}/tokens"])
    assert relative(ours, golden()[f"{kind}/logits"]) < 1e-5
