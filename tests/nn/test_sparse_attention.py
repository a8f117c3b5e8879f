"""Sparse latent attention as the network has it: against the oracle, who sees whom, and which loss trains what."""

import dataclasses
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import dsa as oracle
from oracles.rope import yarn_frequencies
from small import make, make_batch, only, relative, small, tree_relative, widened

from mhc_jax.config import ModelConfig, RopeConfig
from mhc_jax.nn.decoder import batch_loss, initial_router_bias
from mhc_jax.nn.mla import MLA
from mhc_jax.sparse_config import SparseConfig
from mhc_jax.train.stages import of_indexer
from pallas_kernels.visible import PAGE

INDEXER = SparseConfig(index_heads=3, index_dim=10, top_k=5, query_chunk=8)


def sparse(own: SparseConfig = INDEXER, **changes: Any) -> ModelConfig:
    config = small(**({"attention__q_rank": 6} | changes))
    return dataclasses.replace(config, attention=dataclasses.replace(config.attention, sparse=own))


def layer(config: ModelConfig, seed: int = 0) -> MLA:
    """A layer with norms other than 1 and biases other than 0."""
    module, rng = widened(MLA(config, jax.random.key(seed))), np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: p * jnp.asarray(rng.uniform(0.5, 1.5, p.shape)) + (p.ndim == 1) * jnp.asarray(rng.normal(0, 0.2, p.shape)), module
    )


def arrays(module: Any) -> dict[str, np.ndarray]:
    return {path[0].name: np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(module) if len(path) == 1}


def by_the_oracle(config: ModelConfig, module: MLA, x: np.ndarray, positions: np.ndarray, segments: np.ndarray):
    """Output, scores and chosen keys of one sequence."""
    a, r = config.attention, config.attention.rope
    return oracle.dsa(
        x,
        arrays(module),
        arrays(module.indexer),
        positions,
        oracle.causal(segments),
        nope=a.nope_dim,
        rope=a.rope_dim,
        kv_rank=a.kv_rank,
        eps=1e-20,
        frequencies=yarn_frequencies(a.rope_dim, r.theta, r.yarn_factor, r.original_length, r.beta_fast, r.beta_slow),
        temperature=(0.1 * r.mscale * np.log(r.yarn_factor) + 1) ** 2,
        top_k=a.sparse.top_k,
    )


@pytest.mark.parametrize("rope", [RopeConfig(), RopeConfig(yarn_factor=4.0, original_length=8)], ids=["plain", "YaRN"])
def test_a_layer_equals_the_oracle_beyond_top_k(float64, rope):
    config = sparse(init_std=0.5, attention__rope=rope)
    module, batch = layer(config), make_batch(config, length=21)
    x = np.random.default_rng(1).standard_normal((2, 21, config.dim))
    got, report = jax.jit(lambda x: module(x, batch["positions"], batch["segment_ids"]))(jnp.asarray(x))
    loss = 0.0
    for i in range(2):
        out, scores, chosen = by_the_oracle(config, module, x[i], np.asarray(batch["positions"][i]), np.asarray(batch["segment_ids"][i]))
        assert relative(got[i], out) < 1e-12
        assert max(map(len, chosen)) == INDEXER.top_k
        loss += loss_by_the_oracle(config, module, x[i], batch, i, scores, chosen)
    assert float(report.indexer_loss) == pytest.approx(loss, rel=1e-10)


def loss_by_the_oracle(config, module, x, batch, i, scores, chosen) -> float:
    a = config.attention
    rows = jnp.asarray(x)[None], batch["positions"][i : i + 1]
    q_nope, q_rope, _ = module._queries(*rows)
    latent, (key_up, _) = module._latents(*rows), module._ups(jnp.dtype("float64"))
    target = oracle.probabilities(*(np.asarray(v) for v in (q_nope[0], q_rope[0], key_up, latent[0])), chosen, scale=module.scale)
    assert a.sparse is not None
    return oracle.indexer_loss(scores, target, chosen)


def test_pages_are_chosen_for_blocks_of_queries(float64):
    config = sparse(SparseConfig(index_heads=3, index_dim=10, top_k=2 * PAGE, granularity="page", query_chunk=PAGE), init_std=0.5)
    length = 3 * PAGE + 20
    module, x = layer(config), np.random.default_rng(1).standard_normal((1, length, config.dim))
    segments = np.repeat([1, 2], [50, length - 50])
    positions = np.concatenate([np.arange(50), np.arange(length - 50)])
    got, _ = jax.jit(lambda x: module(x, jnp.asarray(positions)[None], jnp.asarray(segments)[None]))(jnp.asarray(x))
    _, scores, _ = by_the_oracle(config, module, x[0], positions, segments)
    visible = oracle.causal(segments)
    chosen = oracle.tokens_of_pages(oracle.select_pages(scores, 2, PAGE), visible, PAGE)
    rows = jnp.asarray(x), jnp.asarray(positions)[None]
    (q_nope, q_rope, _), latent, ups = module._queries(*rows), module._latents(*rows), module._ups(jnp.dtype("float64"))
    out, _, _ = oracle.sparse_mla(*(np.asarray(v) for v in (q_nope[0], q_rope[0], *ups, latent[0])), chosen, scale=module.scale)
    assert relative(got[0], np.einsum("shv,hvc->sc", out, np.asarray(module.out))) < 1e-12


def test_up_to_top_k_tokens_it_is_dense_attention():
    config = sparse(SparseConfig(index_heads=3, index_dim=10, top_k=16))
    dense, batch = small(attention__q_rank=6), make_batch(config)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 16, 16)), jnp.float32)
    module, other = MLA(config, jax.random.key(0)), MLA(dense, jax.random.key(0))
    assert jnp.array_equal(module.query_up, other.query_up)
    assert jnp.array_equal(module(x, batch["positions"], batch["segment_ids"])[0], other(x, batch["positions"], batch["segment_ids"])[0])


def test_one_chosen_key_in_excess_of_top_k_changes_the_output():
    """The two forms agree where every key is chosen, so the sparse path is taken, and gives the same, just above."""
    batch = make_batch(small(), documents=False)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 16, 16)), jnp.float32)

    def out(top_k):
        module = MLA(sparse(SparseConfig(index_heads=3, index_dim=10, top_k=top_k), init_std=0.5), jax.random.key(0))
        return jax.jit(lambda x: module(x, batch["positions"], batch["segment_ids"])[0])(x)

    dense, nearly = out(16), out(15)
    assert relative(nearly[:, :15], dense[:, :15]) < 1e-5
    assert relative(nearly[:, 15:], dense[:, 15:]) > 1e-3


def test_a_token_sees_nothing_later_and_no_other_document():
    config = sparse(init_std=0.5)
    module, segments = MLA(config, jax.random.key(0)), jnp.asarray([[1] * 8 + [2] * 9])
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 17, 16)), jnp.float32)
    positions = jnp.asarray([[*range(8), *range(9)]])
    jacobian = jax.jit(jax.jacrev(lambda x: module(x, positions, segments)[0][0].sum(axis=-1)))(x)[:, 0]
    seen = np.abs(np.asarray(jacobian)).max(axis=-1) > 0
    assert not (seen & ~oracle.causal(segments[0])).any()
    assert (seen.sum(axis=-1) <= INDEXER.top_k + 1).all()  # the keys it attends to, and itself
    assert seen.diagonal().all()


@cache
def losses_gradients(stage: str):
    """Gradients of the language-model loss and of the indexer's, of a whole network."""
    config = sparse(SparseConfig(index_heads=3, index_dim=10, top_k=5, stage=stage, query_chunk=8), init_std=0.3)
    model, batch = make(config), make_batch(config)

    def losses(model):
        total, _, aux = batch_loss(model, batch, initial_router_bias(config))
        return total, aux.indexer_loss.sum()

    _, pull = jax.vjp(losses, model)
    return pull((jnp.ones(()), jnp.zeros(())))[0], pull((jnp.zeros(()), jnp.ones(())))[0]


@pytest.mark.slow
@pytest.mark.parametrize("stage", only(["sparse"], ["warmup", "sparse"]))
def test_neither_loss_has_a_gradient_for_what_the_other_trains(stage):
    """Exactly zero, and not zero where it should not be."""
    of_language_model, of_index = losses_gradients(stage)
    own = jax.tree.leaves(of_indexer(of_index))
    assert sum(own) == 10  # five parameters in each of two stacks of layers
    for indexer, main, index in zip(own, jax.tree.leaves(of_language_model), jax.tree.leaves(of_index)):
        assert (jnp.abs(main if indexer else index) == 0).all()
    assert all(jnp.abs(g).max() > 0 for g, indexer in zip(jax.tree.leaves(of_index), own) if indexer)


def test_both_stages_have_the_same_parameters():
    warm, cold = (
        jax.eval_shape(lambda stage=stage: MLA(sparse(SparseConfig(stage=stage)), jax.random.key(0))) for stage in ("warmup", "sparse")
    )
    assert jax.tree.structure(jax.tree.map(jnp.shape, warm)) is not None
    assert [a.shape for a in jax.tree.leaves(warm)] == [a.shape for a in jax.tree.leaves(cold)]


def test_bfloat16_layer_is_near_the_float32_one():
    config = sparse(init_std=0.5)
    module, batch = MLA(config, jax.random.key(0)), make_batch(config, documents=False)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 16, 16)), jnp.float32)
    run = jax.jit(lambda x: module(x, batch["positions"], batch["segment_ids"])[0])
    # Positions that see at most top_k keys: later ones may choose others for a rounding.
    assert tree_relative(run(x.astype(jnp.bfloat16))[:, :5], run(x)[:, :5]) < 3e-2
