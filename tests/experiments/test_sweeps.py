"""Sweeps: what the generators make, how runs are named, and what is refused."""

import pytest
from fake_run import tiny_config

from mhc_jax.config import difference, override
from mhc_jax.engram_config import EngramConfig
from mhc_jax.errors import UserError
from mhc_jax.experiments.sweeps import chain, field, product, sweep, zipped

RATE, KIND, SEED = "optimizer.learning_rate", "model.residual", "train.seed"


def test_generators_combine_as_their_namesakes_do():
    rates, seeds = field(RATE, 1e-3, 2e-3), field(SEED, 0, 1)
    assert product(rates, seeds) == [{RATE: r, SEED: s} for r in (1e-3, 2e-3) for s in (0, 1)]
    assert product(rates, seeds) == product(rates, seeds)  # an axis may be used again
    assert zipped(rates, seeds) == [{RATE: 1e-3, SEED: 0}, {RATE: 2e-3, SEED: 1}]
    assert chain(rates, seeds) == rates + seeds
    assert product(zipped(rates, field("train.steps", 5, 6)), field(KIND, "hc")) == [
        {RATE: 1e-3, "train.steps": 5, KIND: "hc"},
        {RATE: 2e-3, "train.steps": 6, KIND: "hc"},
    ]


def test_names_say_what_differs_and_nothing_else():
    points = product(field(SEED, 0, 3), field("train.steps", 50), field(KIND, "residual", "mhc"), field(RATE, 1e-3, 1e-5, 0.1 + 0.2))
    runs = sweep("rates", "Which?", tiny_config(), points, baseline={KIND: "residual", RATE: 1e-3})
    assert runs.baseline == "residual learning_rate=0.001"
    assert [run.name for run in runs.runs[3:6]] == [
        "mhc_learning_rate=0.001-seed0",
        "mhc_learning_rate=1e-05-seed0",
        "mhc_learning_rate=0.30000000000000004-seed0",
    ]
    assert runs.variants[3] == "mhc learning_rate=0.001" and len(runs.variants) == 6
    for run, point in zip(runs.runs, points):
        assert run.config == override(tiny_config(), point)
    assert set(difference(runs.runs[0].config, runs.runs[-1].config)) == {SEED, KIND, RATE}


def test_a_seed_alone_makes_no_variant():
    runs = sweep("seeds", "How far apart?", tiny_config(), field(SEED, 0, 1, 2))
    assert runs.variants == ("base",) and [run.name for run in runs.runs] == ["base-seed0", "base-seed1", "base-seed2"]


def test_points_without_a_field_keep_that_of_the_base():
    runs = sweep("depth", "?", tiny_config(layers=3), chain([{}], field("model.num_layers", 4)))
    assert runs.variants == ("num_layers=3", "num_layers=4")


def test_fields_of_one_name_are_told_apart_and_groups_are_numbered():
    small, large = (EngramConfig(layers=(1,), table_sizes=(size, size)) for size in (100, 200))
    points = product(field("model.dense_dim", 64, 96), field("model.moe.expert_dim", 16), field("model.engram", None, small, large))
    runs = sweep("memory", "?", tiny_config(), points)
    assert runs.variants[:3] == ("dense_dim=64 engram=1", "dense_dim=64 engram=2", "dense_dim=64 engram=3")
    points = zipped(
        field("model.moe.shared_experts", 1, 2), field("train.steps", 5, 6), field("optimizer.decay_points", (0.8, 0.9), (0.5, 0.9))
    )
    assert sweep("x", "?", tiny_config(), points).runs[0].name == "shared_experts=1_steps=5_decay_points=0.8_0.9-seed0"


def test_long_names_stay_different():
    points = [{"data.source": (letter * 40,), "data.tokenizer": "t" * 40, "model.dense_dim": size} for size in (64, 96) for letter in "ab"]
    many = [{**p, "optimizer.learning_rate": 0.1 / 3 + i, "optimizer.clip_norm": 0.1 / 7 + i} for i, p in enumerate(points)]
    runs = sweep("long", "?", tiny_config(), many)
    assert len({run.name for run in runs.runs}) == 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: field(RATE), "has no values"),
        (lambda: product(field(RATE, 1), field(RATE, 2)), f"two axes change {RATE}"),
        (lambda: zipped(field(RATE, 1, 2), field(SEED, 0)), "equally long; these have 2, 1"),
        (lambda: sweep("s", "?", tiny_config(), []), "'s' holds no runs"),
        (lambda: sweep("s", "?", tiny_config(), [3]), "point 1 of the sweep is 3"),
        (lambda: sweep("s", "?", tiny_config(), field("train.learning_rate", 1.0)), r"point 1 of the sweep \(train.learning_rate = 1.0\)"),
        (lambda: sweep("s", "?", tiny_config(), field("train.seed.", 1)), "there is no config field 'seed.'"),
        (lambda: sweep("s", "?", tiny_config(), field(KIND, "mhc", "mch")), r"point 2 of the sweep \(model.residual = 'mch'\)"),
        (
            lambda: sweep("s", "?", tiny_config(), field(RATE, 1e-3, 2e-3, 1e-3)),
            "points 1 and 3 are the same run, learning_rate=0.001-seed0",
        ),
        (lambda: sweep("s", "?", tiny_config(), field("name", "a", "b")), "points 1 and 2 are the same run, base-seed0"),
        (
            lambda: sweep("s", "?", tiny_config(), field(RATE, 1e-3, 2e-3), baseline={KIND: "mhc"}),
            r"picks several variants \(learning_rate=0.001, learning_rate=0.002\)",
        ),
        (lambda: sweep("s", "?", tiny_config(), field(KIND, "hc", "mhc"), baseline={KIND: "residual"}), "picks none of hc, mhc"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
