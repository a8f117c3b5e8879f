"""Named configs: their every field pinned, their sizes those of the paper, and what validation says."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
from small import BASE, KINDS, make, small

from mhc_jax import mesh_config, sparse_config
from mhc_jax.config import difference, fields, from_json, override, to_json, to_text
from mhc_jax.configs import CONFIGS, get
from mhc_jax.engram_config import EngramConfig
from mhc_jax.errors import UserError
from mhc_jax.nn.count import count_parameters, idle_experts
from pallas_kernels import visible
from pallas_kernels.engram_gate import HALO

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", CONFIGS)
def test_every_field_is_as_checked_in(name):
    path, text = GOLDEN / f"{name}.txt", to_text(get(name))
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert path.exists(), f"{path.name} is missing; UPDATE_GOLDEN=1 python -m pytest {Path(__file__).name} writes it"
    assert path.read_text() == text, (
        f"the config {name!r} differs from {path.name}; if that is meant, run UPDATE_GOLDEN=1 python -m pytest {Path(__file__).name}"
    )


def test_no_golden_file_without_a_config():
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_called_what_it_is_listed_as_and_says_what_to_expect(name):
    assert get(name).name == name
    doc = CONFIGS[name].__doc__ or ""
    assert "Expect:" in doc
    assert "Command: mhc-jax" in doc


def test_an_unknown_name_is_refused_and_the_known_ones_are_listed():
    with pytest.raises(UserError, match=r"'28b'.*laptop.*27b"):
        get("28b")


@pytest.mark.parametrize(
    ("name", "total", "active"), [("3b", 2.97e9, 612e6), ("9b", 9.18e9, 1.66e9), ("27b", 27.0e9, 4.14e9), ("3b_1t", 2.97e9, 612e6)]
)
def test_sizes_are_those_of_the_papers_table_5(name, total, active):
    count = count_parameters(get(name).model)
    assert count.total == pytest.approx(total, rel=3e-3)
    assert count.active == pytest.approx(active, rel=3e-3)


@pytest.mark.parametrize(
    ("name", "total", "tables"),
    [("engram_27b", 26.7e9, 5.79e9), ("engram_40b", 39.5e9, 18.53e9), ("engram_moe_27b", 26.7e9, 0), ("engram_dense_4b", 4.1e9, 0)],
)
def test_sizes_are_those_of_engrams_table_5(name, total, tables):
    """Which counts the vocabulary once."""
    model = get(name).model
    count = count_parameters(model)
    assert count.total - model.vocab_size * model.dim == pytest.approx(total, rel=3e-3)
    assert count.table == pytest.approx(tables, rel=1e-3)
    assert count.active - model.vocab_size * model.dim == pytest.approx(3.8e9, rel=1.1e-2)
    assert get(name).tokens_per_step * get(name).train.steps == pytest.approx(262e9, rel=3e-3)


@pytest.mark.parametrize(
    ("name", "total", "active", "within"),
    [("v3_671b", 671e9, 36.7e9, 1e-2), ("deepseek_v32", 672e9, 37e9, 2e-2), ("moe_1t", 1e12, 37e9, 3e-2)],
)
def test_sizes_of_the_largest(name, total, active, within):
    """DeepSeek-V3's are those of its release: 671B, and 36.7B ("37B") active."""
    count = count_parameters(get(name).model)
    assert count.total == pytest.approx(total, rel=within)
    assert count.active == pytest.approx(active, rel=within)
    if name != "deepseek_v32":
        assert get(name).tokens_per_step * get(name).train.steps == pytest.approx(14.8e12, rel=1e-3)


@pytest.mark.parametrize(("name", "tokens"), [("3b", 39.3e9), ("9b", 105e9), ("27b", 262e9), ("3b_1t", 1.05e12)])
def test_tokens_are_those_of_the_papers_table_5(name, tokens):
    config = get(name)
    assert config.tokens_per_step * config.train.steps == pytest.approx(tokens, rel=3e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_connection_parameters_are_counted_by_formula(kind):
    """n = 4 streams of C = 16 at 6 sublayers: see the classes for the shapes."""
    n, c = 4, 16
    per_sublayer = {
        "residual": 0,
        "static_hc": n * (n + 2),
        "hc": (n + 2) * c + n * (n + 2) + 3,
        "mhc": n * (n + 2) * n * c + n * (n + 2) + 3,
        "identity_hc": 2 * n * n * c + 2 * n + 2,
        "mhc_lite": (2 * n + 24) * n * c + 2 * n + 24 + 3,
        "kromhc": (2 * n + 4) * n * c + 2 * n + 4 + 3,
    }
    assert count_parameters(small(residual=kind)).connection == 6 * per_sublayer[kind]
    plain = count_parameters(small(residual="residual"))
    assert count_parameters(small(residual=kind)).total == plain.total + 6 * per_sublayer[kind]


@pytest.mark.slow
def test_active_parameters_leave_out_the_embedding_and_idle_experts():
    model = small()
    count = count_parameters(model)
    experts = make(model).moe_layers.ffn
    idle = (experts.inner.size + experts.out.size) * (model.moe.num_experts - model.moe.top_k) // model.moe.num_experts
    assert count.active == count.total - model.vocab_size * model.dim - idle
    assert idle_experts(model) == idle


BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "an unknown kind": ({"model.residual": "mhx"}, ["model.residual", "'mhx'", "identity_hc"]),
    "more permutations than can be": ({"model.residual": "mhc_lite", "model.connections.streams": 7}, ["streams is 7", "5054", "mhc_lite"]),
    "a large prime of streams": ({"model.residual": "kromhc", "model.connections.streams": 7}, ["streams is 7", "5054", "kromhc"]),
    "zero layers": ({"model.num_layers": 0}, ["model.num_layers is 0", "positive"]),
    "infinite learning rate": ({"optimizer.learning_rate": float("inf")}, ["optimizer.learning_rate is inf"]),
    "not a number": ({"optimizer.weight_decay": float("nan")}, ["optimizer.weight_decay", "not a number"]),
    "negative decay": ({"optimizer.weight_decay": -0.1}, ["optimizer.weight_decay is -0.1", "zero or"]),
    "beta of one": ({"optimizer.beta2": 1.0}, ["optimizer.beta2 is 1.0", "[0, 1)"]),
    "all held out": ({"data.heldout_share": 1.0}, ["data.heldout_share is 1.0"]),
    "no source": ({"data.source": ()}, ["data.source is empty", "stdlib"]),
    "an empty source": ({"data.source": ("a", "")}, ["data.source is empty"]),
    "a source twice": ({"data.source": ("a", "b", "a")}, ["data.source names a source twice (a, b, a)"]),
    "too few weights": ({"data.source": ("a", "b"), "data.weights": (1.0,)}, ["data.weights has 1 weights", "data.source has 2 sources"]),
    "a weight of zero": ({"data.source": ("a", "b"), "data.weights": (1.0, 0.0)}, ["data.weights holds 0.0"]),
    "an infinite weight": ({"data.source": ("a", "b"), "data.weights": (1.0, float("inf"))}, ["data.weights holds a value that is inf"]),
    "a weight that is no number": (
        {"data.source": ("a", "b"), "data.weights": (1.0, float("nan"))},
        ["data.weights holds a value that is not a number"],
    ),
    "no text field": ({"data.text_field": ""}, ["data.text_field is empty"]),
    "no tokenizer": ({"data.tokenizer": ""}, ["data.tokenizer is empty", "tokenizer.json"]),
    "negative bad records": ({"data.max_bad_records": -1}, ["data.max_bad_records is -1"]),
    "falling decay points": ({"optimizer.decay_points": (0.9, 0.8)}, ["optimizer.decay_points is (0.9, 0.8)"]),
    "too many dense layers": ({"model.dense_layers": 4}, ["model.dense_layers is 4", "model.num_layers = 3"]),
    "odd rotary dimension": ({"model.attention.rope_dim": 5}, ["is 2", "model.attention.rope_dim = 5"]),
    "shrinking context": ({"model.attention.rope.yarn_factor": 0.5}, ["model.attention.rope.yarn_factor is 0.5"]),
    "uneven groups": ({"model.moe.num_groups": 3}, ["model.moe.num_groups is 3", "model.moe.num_experts = 4"]),
    "more groups than there are": ({"model.moe.top_groups": 2}, ["model.moe.top_groups is 2", "model.moe.num_groups = 1"]),
    "more experts than there are": ({"model.moe.top_k": 5}, ["model.moe.top_k is 5", "only 4 of the 4"]),
    "more experts than the groups hold": (
        {"model.moe.num_groups": 4, "model.moe.top_groups": 1},
        ["model.moe.top_k is 2", "1 of 4 groups hold only 1 of the 4"],
    ),
    "nine streams": ({"model.connections.streams": 9}, ["model.connections.streams is 9", "1 to 8"]),
    "uneven microbatches": ({"train.microbatches": 3}, ["train.microbatches is 3", "train.batch_size = 8"]),
    "uneven mesh": ({"mesh.data": 3}, ["mesh.data x mesh.fsdp x mesh.expert is 3", "train.batch_size / train.microbatches = 8"]),
    "uneven width": ({"mesh.fsdp": 32, "train.batch_size": 32}, ["mesh.fsdp is 32", "model.dim = 16"]),
    "a field that does not exist": ({"model.moe.topk": 2}, ["'topk'", "top_k"]),
    "a room that does not exist": ({"modle.dim": 2}, ["'modle.dim'", "model"]),
}


@pytest.mark.parametrize("what", BAD)
def test_a_mistake_is_refused_with_the_field_and_the_numbers(what):
    changes, fragments = BAD[what]
    with pytest.raises(UserError) as error:
        override(BASE, changes)
    for fragment in fragments:
        assert re.search(re.escape(fragment), str(error.value)), (fragment, str(error.value))


@pytest.mark.parametrize("name", CONFIGS)
def test_json_holds_all_of_a_config(name):
    config = get(name)
    assert from_json(to_json(config)) == config


def test_a_group_that_may_be_missing_is_kept_compared_and_changed():
    engram = EngramConfig(layers=(1,), table_sizes=(100, 200))
    with_it = override(BASE, {"model.engram": engram})
    assert from_json(to_json(with_it)) == with_it
    assert difference(with_it, override(with_it, {"model.engram.heads": 4})) == {"model.engram.heads": (8, 4)}
    for a, b in ((BASE, with_it), (with_it, BASE)):
        changed = difference(a, b)
        assert changed["model.engram.layers"] == ((1,), None)[:: 1 if a is with_it else -1]
        assert all(path.startswith("model.engram.") for path in changed)
    assert override(with_it, {"model.engram": None}) == BASE
    with pytest.raises(UserError, match=r"heads: there are no fields below None; a group that is None must be given as a whole"):
        override(BASE, {"model.engram.heads": 4})


ENGRAM_BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no layers": ({"layers": ()}, "model.engram.layers is ()"),
    "falling layers": ({"layers": (2, 1)}, "model.engram.layers is (2, 1); it must hold one or more rising numbers"),
    "a layer twice": ({"layers": (1, 1)}, "model.engram.layers is (1, 1)"),
    "a layer too many": ({"layers": (3,)}, "model.engram.layers is (3,), but the model's layers are 0 to 2"),
    "layer 0 of layers from 1": ({"layers": (0, 1), "layer_base": 1}, "the model's layers are 1 to 3"),
    "layers from 2": ({"layer_base": 2}, "model.engram.layer_base is 2"),
    "unigrams": ({"orders": (1, 2)}, "model.engram.orders is (1, 2); 2 to 8"),
    "no heads": ({"heads": 0}, "model.engram.heads is 0"),
    "one size for two orders": ({"table_sizes": (100,)}, "model.engram.table_sizes has 1 sizes, but model.engram.orders has 2"),
    "tables of one row": ({"table_sizes": (1, 100)}, "model.engram.table_sizes is (1, 100); every size must be at least 3"),
    "more rows than int32 numbers": ({"table_sizes": (2**28, 2**28)}, "ask for 4294967296 rows a layer"),
    "a negative seed": ({"seed": -1}, "model.engram.seed is -1"),
    "padding outside the vocabulary": ({"pad_id": 48}, "model.engram.pad_id is 48; it must be a token id, 0 to 47"),
}


@pytest.mark.parametrize("what", ENGRAM_BAD)
def test_a_mistake_in_engram_is_refused(what):
    changes, message = ENGRAM_BAD[what]
    engram = EngramConfig(**{"layers": (1,), "table_sizes": (100, 200), **changes})
    with pytest.raises(UserError, match=re.escape(message)):
        override(BASE, {"model.engram": engram})


def test_a_saved_config_of_another_version_is_refused_and_the_odd_fields_are_named():
    data = to_json(BASE)
    data["model"]["moe"]["capacity"] = 2
    del data["train"]["seed"]
    with pytest.raises(UserError, match=r"model\.moe\.capacity"):
        from_json(data)
    del data["model"]["moe"]["capacity"]
    with pytest.raises(UserError, match=r"train\.seed"):
        from_json(data)
    with pytest.raises(UserError, match="model"):
        from_json({**to_json(BASE), "model": 3})


def test_a_difference_names_the_fields_that_differ():
    other = override(BASE, {"model.moe.top_k": 1, "train.seed": 3})
    assert difference(BASE, other) == {"model.moe.top_k": (2, 1), "train.seed": (0, 3)}
    assert difference(BASE, BASE) == {}


def test_an_override_leaves_the_rest_alone():
    assert dict(fields(override(BASE, {"model.moe.top_k": 1}))) == {**dict(fields(BASE)), "model.moe.top_k": 1}


def test_numbers_that_configs_share_with_kernels_are_theirs():
    """A config imports no kernel, which would wake JAX."""
    assert sparse_config.PAGE == visible.PAGE
    assert mesh_config.CONV_REACH == HALO
