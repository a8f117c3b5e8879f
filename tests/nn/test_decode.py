"""Decoding with a cache equals the network on whole sequences, however they are cut into calls; and what a call must not touch."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ngrams_made import made
from small import FORMS, make, only, relative, shaken
from small import small as small_of_three

from mhc_jax.data.ngrams.hashing import NgramHash
from mhc_jax.engram_config import EngramConfig
from mhc_jax.nn.decode import Cache, Ngrams, decode, network_of
from mhc_jax.nn.decoder import logits
from mhc_jax.nn.ngram_hash import hash_numbers
from mhc_jax.sparse_config import SparseConfig

small = partial(small_of_three, num_layers=2)  # one dense, one with experts

LENGTHS = (23, 9, 16)
CAPACITY = 32
ENGRAM = EngramConfig(layers=(0, 1), table_sizes=(101, 211), heads=2, head_dim=4)
SPARSE = SparseConfig(index_heads=2, index_dim=8, top_k=6, query_chunk=8)
STEP = jax.jit(decode, donate_argnames="cache")
CUTS = ((23,), (5, 1, 1, 10, 6), (1,) * 23)


@cache
def tokens_of(vocab=48):
    return np.random.default_rng(0).integers(0, vocab, (len(LENGTHS), CAPACITY))


def awake(model):
    """Connections, gains, norms and convolutions that differ from their initial values, so that each of them matters."""
    rng = np.random.default_rng(1)

    def change(path, p):
        name = path[-1].name
        moved = "norm" in name or "gain" in name or name in ("conv", "qk_scales")
        return p + jnp.asarray(0.5 * rng.standard_normal(p.shape), p.dtype) if moved else p

    return jax.tree_util.tree_map_with_path(change, shaken(model))


@cache
def problem(config, dtype):
    """The network in pieces, and a function of nothing that gives its logits of every token of whole sequences."""
    rng = np.random.default_rng(2)
    model = jax.tree.map(lambda p: jnp.asarray(np.asarray(p), dtype), awake(make(config)))
    bias = jnp.asarray(0.1 * rng.standard_normal((config.num_layers - config.dense_layers, config.moe.num_experts)), dtype)
    ngrams, read = None, ()
    if config.engram is not None:
        artifact = made(config.engram, config.vocab_size)
        tables = tuple(jnp.asarray(rng.standard_normal((rows, config.engram.head_dim)), dtype) for rows in artifact.rows)
        numbers = hash_numbers(artifact.multipliers, artifact.primes, artifact.offsets)
        ngrams = Ngrams(tables, numbers, jnp.asarray(artifact.lookup), jnp.asarray(artifact.pad))
        rows = NgramHash(artifact).rows(tokens_of().astype(np.int32), np.ones(tokens_of().shape, np.int32))  # as training has them
        read = tuple(table[rows[:, :, i]].reshape(*rows.shape[:2], -1) for i, table in enumerate(tables))

    def whole():
        tokens = jnp.asarray(tokens_of())
        positions = jnp.broadcast_to(jnp.arange(CAPACITY), tokens.shape)
        return np.asarray(jax.jit(lambda model: logits(model, tokens, positions, jnp.ones_like(tokens), bias, memory=read))(model))

    return network_of(model, bias, ngrams), whole


def run(network, config, cuts, dtype):
    """Feeds all sequences in calls of these sizes; yields for every call how many tokens each got and has had, and the logits."""
    kept, at = Cache.empty(config, len(LENGTHS), CAPACITY, dtype), 0
    for size in cuts:
        count = np.clip(np.array(LENGTHS) - at, 0, size)
        part = np.where(np.arange(size)[None] < count[:, None], tokens_of()[:, at : at + size], 7)  # what only fills up is never seen
        given = kept
        found, kept = STEP(network, jnp.asarray(part), jnp.asarray(count), given)
        assert all(x.is_deleted() for x in jax.tree.leaves(given.latents))  # updated in place
        at += size
        assert np.array_equal(kept.length, np.minimum(LENGTHS, at))
        yield count, np.asarray(kept.length), np.asarray(found)


def largest_error(config, cuts, dtype=jnp.float64):
    network, whole = problem(config, dtype)
    wanted, worst = whole(), 0.0
    for count, length, found in run(network, config, cuts, dtype):
        for b in np.flatnonzero(count):
            worst = max(worst, relative(found[b], wanted[b, length[b] - 1]))
    return worst


SPARSELY = {"attention__q_rank": 6, "attention__sparse": SPARSE}
CASES = {
    **{kind: {"residual": kind} for kind in FORMS},
    "qk_norm, plain": {"residual": "residual", "attention__qk_norm": True},
    "learned collapse, query latent": {"connections__collapse": "learned", "attention__q_rank": 6},
    "sum, all dense": {"connections__collapse": "sum", "dense_layers": 2},
    "sparse, plain": {"residual": "residual", **SPARSELY},
    "warmup": {"attention__q_rank": 6, "attention__sparse": dataclasses.replace(SPARSE, stage="warmup")},
    "engram, sparse": {"engram": ENGRAM, **SPARSELY},
    "engram, plain": {"residual": "residual", "engram": ENGRAM},
    "engram without convolution": {"engram": dataclasses.replace(ENGRAM, conv=False)},
    "groups": {"moe__num_groups": 2, "moe__top_k": 1},
}


@pytest.mark.parametrize("case", only(["engram, sparse"], CASES))
def test_decoding_equals_whole_sequences(float64, case):
    """Ragged sequences, the first tokens in two calls and the others one by one."""
    assert largest_error(small(**CASES[case]), (8, 8, *(1,) * 7)) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("cuts", CUTS, ids=lambda cuts: f"{len(cuts)} calls")
def test_it_does_not_matter_where_a_sequence_is_cut(float64, cuts):
    assert largest_error(small(**CASES["engram, sparse"]), cuts) < 1e-9


@pytest.mark.slow
def test_in_float32_to_rounding():
    assert largest_error(small(engram=ENGRAM), (16, 7), jnp.float32) < 1e-5


def test_a_sequence_that_gets_no_token_and_a_full_cache_stay_as_they_are(float64):
    config = small(**CASES["engram, sparse"])
    network, _ = problem(config, jnp.float64)
    full = Cache.empty(config, 3, CAPACITY, jnp.float64)
    for at in range(0, CAPACITY, 8):
        _, full = STEP(network, jnp.asarray(tokens_of()[:, at : at + 8]), jnp.array([8, 8, 2 if at == 0 else 0]), full)
    assert full.length.tolist() == [CAPACITY, CAPACITY, 2]
    before = jax.tree.map(np.asarray, full)
    assert np.abs(before.latents[0].latent[2, :2]).min() > 0 and not before.latents[0].latent[2, 2:].any()
    _, after = STEP(network, jnp.asarray(tokens_of()[:, :1]), jnp.array([1, 0, 0]), full)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after)):
        np.testing.assert_array_equal(old[1:], new[1:])
    for old, new in zip(jax.tree.leaves(before.latents), jax.tree.leaves(after.latents)):
        np.testing.assert_array_equal(old, new)  # what is beyond the cache is not remembered


def test_a_cache_of_another_config_is_refused_by_name():
    config = small()
    network = network_of(make(config), jnp.zeros((1, config.moe.num_experts)))
    step = partial(jax.eval_shape, decode, network, jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32))
    with pytest.raises(ValueError, match=r"latents\[0\]\.latent is \[1, 8, 8\], needed is \[1, 8, 16\]"):
        step(Cache.empty(small(attention__kv_rank=4), 1, 8))
    with pytest.raises(ValueError, match=r"latents\[1\]\.latent is not there, needed is \[1, 8, 16\]"):
        step(Cache.empty(small(num_layers=1), 1, 8))
    with pytest.raises(ValueError, match=r"\.before is \[1, 2\], needed is none"):
        step(Cache.empty(small(engram=ENGRAM), 1, 8))
