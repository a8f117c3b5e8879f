"""What the stages of sparse attention train, and runs that begin with the parameters of another."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import only
from test_step import batch_of

from mhc_jax.config import override
from mhc_jax.errors import UserError
from mhc_jax.experiments.run_attention import network_of_run
from mhc_jax.nn.module import named_parameters
from mhc_jax.parallel.rules import Rules
from mhc_jax.sparse_config import SparseConfig
from mhc_jax.train.loop import train
from mhc_jax.train.metrics import read_lines
from mhc_jax.train.parameters import parameters_of
from mhc_jax.train.stages import clip
from mhc_jax.train.step import initial_state, train_step

OWN = SparseConfig(index_heads=2, index_dim=8, top_k=8, query_chunk=16)


def staged(config, stage, **changes):
    """The config with an indexer in this stage."""
    own = SparseConfig(**{**OWN.__dict__, "stage": stage})
    return override(config, {"model.attention.q_rank": 8, "model.attention.sparse": own, **changes})


@cache
def stepped(config, steps):
    step = jax.jit(partial(train_step, config=config, rules=Rules()))
    state, told = initial_state(config), []
    for _ in range(steps):
        state, metrics = step(state, batch_of(config))
        told.append(metrics)
    return state, told


def changed(config, steps=2) -> set[str]:
    before, (after, _) = initial_state(config), stepped(config, steps)
    pairs = zip(named_parameters(before.model), named_parameters(after.model))
    return {name for (name, a), (_, b) in pairs if not jnp.array_equal(a, b)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", only(["adamw"], ["adamw", "muon"]))
def test_the_warm_up_moves_the_indexer_alone(tiny, kind):
    config = staged(tiny, "warmup", **{"optimizer.kind": kind, "optimizer.warmup_steps": 0})
    state, _ = stepped(config, 2)
    every = {name for name, _ in named_parameters(state.model) if ".indexer." in name}
    assert changed(config) == every != set()
    assert not np.asarray(state.router_bias).any()
    moments = sum(x.size for x in jax.tree.leaves(state.optimizer) if x.ndim)
    assert moments <= 2 * sum(p.size for name, p in named_parameters(state.model) if name in every)  # none for what is frozen


def test_the_warm_up_brings_the_indexer_nearer_to_the_attention(tiny):
    config = staged(tiny, "warmup", **{"optimizer.warmup_steps": 0, "optimizer.learning_rate": 3e-3, "train.steps": 1000})
    _, told = stepped(config, 30)
    losses = [float(metrics.indexer_loss) for metrics in told]
    assert losses[-1] < 0.8 * losses[0]
    assert len({float(metrics.loss) for metrics in told}) == 1  # the network stays what it was
    assert all(float(metrics.grad_norm) == 0 for metrics in told)


@pytest.mark.slow
def test_the_sparse_stage_moves_everything(tiny):
    config = staged(tiny, "sparse", **{"optimizer.warmup_steps": 0, "model.residual": "residual"})
    assert changed(config) == {name for name, _ in named_parameters(initial_state(config).model)}


def test_the_indexers_gradient_holds_no_other_back(tiny):
    """A tenfold loss of the indexer leaves the factor of everything else as it is."""
    config = staged(tiny, "sparse")
    state = initial_state(config)
    grads = jax.tree.map(jnp.ones_like, state.model)
    large = jax.tree_util.tree_map_with_path(lambda path, g: g * (10 if any(k.name == "indexer" for k in path) else 1), grads)
    small_clip, large_clip = clip(grads, [], config), clip(large, [], config)
    assert float(small_clip.scale) == float(large_clip.scale) < 1
    assert float(large_clip.indexer_scale) == pytest.approx(float(small_clip.indexer_scale) / 10)
    assert float(small_clip.clipped) == 1


def begin(config, folder):
    lines: list[str] = []
    train(config, folder, say=lines.append)
    return lines


@pytest.fixture(scope="module")
def dense_run(tiny, tmp_path_factory):
    """A finished run with dense attention: its config and its folder."""
    config = override(tiny, {"model.attention.q_rank": 8})
    folder = tmp_path_factory.mktemp("dense") / "run"
    begin(config, folder)
    return config, folder


def test_a_stage_begins_with_the_parameters_of_the_one_before(dense_run, tmp_path):
    config, folder = dense_run
    warm = staged(config, "warmup", **{"train.init_from": str(folder)})
    lines = begin(warm, tmp_path / "warm")
    (said,) = [line for line in lines if "beginning with" in line]
    assert "indexer.query" in said
    assert "latent_norm" not in said
    (dense, _, _), (after, _, missing) = (
        parameters_of(place, own, initial_state(own)) for place, own in ((folder, config), (tmp_path / "warm", warm))
    )
    assert missing == []
    frozen = dict(named_parameters(dense.model))
    for name, parameter in named_parameters(after.model):
        assert ".indexer." in name or jnp.array_equal(parameter, frozen[name])
    # A run that goes on takes its own checkpoint, not the other's parameters.
    assert not [line for line in begin(warm, tmp_path / "warm") if "beginning with" in line]
    evaluations = [line for line in read_lines(tmp_path / "warm" / "metrics.jsonl") if line["kind"] == "eval"]
    assert all(line["indexer_loss"] > 0 for line in evaluations)
    own, network = network_of_run(tmp_path / "warm")
    assert own == override(warm, {"train.init_from": None})
    trained = dict(named_parameters(after.model))
    shared = named_parameters(network.model)
    assert shared and all(jnp.array_equal(parameter, trained[name]) for name, parameter in shared)


def test_what_cannot_be_begun_from_is_refused_before_the_folder_is_claimed(dense_run, tmp_path):
    config, folder = dense_run
    with pytest.raises(UserError, match="no run in"):
        begin(override(config, {"train.init_from": str(tmp_path / "nothing")}), tmp_path / "new")
    wider = override(config, {"train.init_from": str(folder), "model.dim": 2 * config.model.dim})
    with pytest.raises(UserError, match=r"no checkpoint in .* can be used.*not float32"):
        begin(wider, tmp_path / "new")
    other = override(config, {"train.init_from": str(folder), "model.vocab_size": config.model.vocab_size - 8})
    with pytest.raises(UserError, match="another tokenizer"):
        begin(other, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_parameters_of_a_network_without_experts(tiny, tmp_path):
    """It has no router biases, so that none are saved; from shapes alone an array comes all the same."""
    config = override(tiny, {"model.dense_layers": tiny.model.num_layers, "train.steps": 2})
    begin(config, tmp_path / "run")
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), jax.eval_shape(lambda: initial_state(config)))
    state, step, missing = parameters_of(tmp_path / "run", config, like)
    assert (step, missing) == (2, []) and isinstance(state.router_bias, jax.Array) and state.router_bias.size == 0
