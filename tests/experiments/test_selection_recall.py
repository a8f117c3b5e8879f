"""`mhc-jax recall`: bins against a loop, what every choice finds where that is known, and a run's layers against the network's own loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import make, make_batch, small

from mhc_jax.cli import main
from mhc_jax.experiments import run_attention, selection_recall
from mhc_jax.experiments.selection_recall import Scored, binned, expected, recalls
from mhc_jax.nn.decode import network_of
from mhc_jax.nn.decoder import hidden_states, initial_router_bias
from mhc_jax.sparse_config import SparseConfig
from pallas_kernels.indexer import index_scores
from pallas_kernels.visible import PAGE, Span


def scored(keys=512, queries=64, heads=4, attention=None):
    rng = np.random.default_rng(0)
    q, k, weight = (rng.standard_normal(shape) for shape in ((1, queries, heads, 8), (1, keys, 8), (1, queries, heads)))
    stop = np.arange(keys - queries, keys)[None] + 1
    arrays = [jnp.asarray(x, jnp.float32) for x in (q, k, weight)]
    return Scored(*arrays, Span(*(jnp.asarray(x, jnp.int32) for x in (stop * 0, stop))), attention)


@pytest.mark.parametrize(("keys", "bins", "chosen"), [(24, 8, 5), (23, 8, 8), (10, 10, 4)])
def test_a_bin_yields_its_largest_key(keys, bins, chosen):
    scores = np.random.default_rng(1).permutation(6 * keys).reshape(6, keys).astype(np.float32)
    scores[0, 3:] = -np.inf
    got = np.asarray(binned(jnp.asarray(scores), chosen, bins))
    for row, found in zip(scores, got):
        left = sorted((max((row[key], key) for key in range(bin_, keys, bins)) for bin_ in range(bins)), reverse=True)
        assert set(np.flatnonzero(found)) == {key for value, key in left[:chosen] if value > -np.inf}


@pytest.mark.slow
def test_bins_find_what_chance_lets_them_find():
    """Scores at random: each row's share is a mean of 512 keys, so that 256 rows are within a few parts in a thousand."""
    scores = jax.random.normal(jax.random.key(0), (256, 4096))
    exact = scores >= jax.lax.top_k(scores, 512)[0][:, -1:]
    for share in (2, 4):
        found = float((binned(scores, 512, 4096 // share) & exact).sum()) / (256 * 512)
        assert abs(found - expected(512 / 4096, share)) < 2e-3


@pytest.mark.slow
def test_the_exact_choice_catches_the_most_where_attention_follows_the_scores():
    problem = scored()
    attention = jax.nn.softmax(index_scores(*problem[:4]), axis=-1)
    found = {one.choice: one for one in recalls(problem._replace(attention=attention), 2 * PAGE)}
    assert list(found) == ["exact", "pages of 64", "2 keys a bin", "4 keys a bin"]
    assert found["exact"].found == 1
    for name in list(found)[1:]:
        assert 0 < found[name].found < 1 and found[name].attention < found["exact"].attention < 1


@pytest.mark.slow
def test_pages_find_what_lies_together():
    """Keys 64 to 191 alone have positive scores; one of two pages is theirs, the other that of the queries, chosen in any case."""
    problem = scored()
    k = jnp.where(((jnp.arange(512) >= 64) & (jnp.arange(512) < 192))[None, :, None], 1.0, -1.0) * jnp.ones((1, 512, 8))
    made = problem._replace(q=jnp.ones_like(problem.q), k=k, weight=jnp.ones_like(problem.weight))
    found = {one.choice: one.found for one in recalls(made, 2 * PAGE)}
    assert found["pages of 64"] == 0.5


@pytest.mark.slow
def test_layers_are_those_of_the_network():
    """KL(attention || softmax of scores) of every layer is the indexer's loss that the network itself reports."""
    config = small(attention__q_rank=6, init_std=0.3)
    own = SparseConfig(index_heads=3, index_dim=10, top_k=5, query_chunk=8, stage="warmup")
    config = dataclasses.replace(config, attention=dataclasses.replace(config.attention, sparse=own))
    model, batch = make(config), make_batch(config, sequences=1, length=16)
    names = ("tokens", "positions", "segment_ids")
    bias = initial_router_bias(config)
    _, aux = jax.jit(hidden_states)(model, *(batch[name] for name in names), bias)
    for layer, wanted in zip(run_attention.layers_of(network_of(model, bias), batch), aux.indexer_loss, strict=True):
        p, log_q = layer.attention, jax.nn.log_softmax(index_scores(*layer[:4]), axis=-1)
        np.testing.assert_allclose(p.sum(axis=-1), 1, rtol=1e-5)
        loss = jnp.where(p > 0, p * (jnp.log(jnp.where(p > 0, p, 1)) - jnp.where(p > 0, log_q, 0)), 0).sum()
        np.testing.assert_allclose(loss, wanted, rtol=1e-4)


def test_the_command(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(selection_recall, "RANDOM", (1024, 64, 8, 16, 8))
    assert main(["recall"]) == 0
    assert "| random | 1,024 | 64 | 2 keys a bin |" in capsys.readouterr().out
    assert main(["recall", str(tmp_path)]) == 2
    assert "there is no run in" in capsys.readouterr().err
