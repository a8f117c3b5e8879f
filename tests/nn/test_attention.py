"""Latent attention, rotary embedding and YaRN against their oracles; who sees whom."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import mla as oracle
from oracles import rope as rope_oracle
from small import make_batch, relative, small, widened

from mhc_jax.config import RopeConfig
from mhc_jax.nn.mla import MLA
from mhc_jax.nn.rotary import frequencies, rotate, softmax_temperature

V3 = RopeConfig(theta=10_000.0, yarn_factor=40.0, original_length=4096)


@pytest.mark.parametrize(
    "rope", [V3, RopeConfig(), RopeConfig(theta=500.0, yarn_factor=4.0, original_length=64, beta_fast=4.0, beta_slow=0.5)]
)
def test_frequencies_equal_the_oracle(rope):
    wanted = rope_oracle.yarn_frequencies(64, rope.theta, rope.yarn_factor, rope.original_length, rope.beta_fast, rope.beta_slow)
    assert relative(np.log(frequencies(64, rope)), np.log(wanted)) < 1e-14


def test_deepseek_v3_stretches_pairs_from_10_to_23():
    plain, stretched = 10_000.0 ** (-np.arange(32) / 32), frequencies(64, V3)
    ratio = plain / stretched
    assert np.allclose(ratio[:11], 1, rtol=1e-12)
    assert ratio[11] > 1.01
    assert ratio[22] < 39
    assert np.allclose(ratio[23:], 40, rtol=1e-12)


def test_deepseek_v3_softmax_temperature():
    assert softmax_temperature(V3) == pytest.approx(1.3689**2, rel=1e-4)
    assert softmax_temperature(V3) == pytest.approx((0.1 * math.log(40) + 1) ** 2, rel=1e-15)
    assert softmax_temperature(RopeConfig()) == 1


def test_rotation_turns_neighbouring_pairs(float64):
    x, positions = np.random.default_rng(0).standard_normal((1, 5, 8)), np.array([[0, 1, 2, 100, 4095]])
    wanted = [rope_oracle.rotate(v, p, frequencies(8, V3)) for v, p in zip(x[0], positions[0])]
    assert relative(rotate(jnp.asarray(x), jnp.asarray(positions), V3)[0], np.stack(wanted)) < 1e-12


CASES: dict[str, dict[str, Any]] = {
    "full-rank queries": {},
    "query latent": {"attention__q_rank": 5},
    "query and key norms": {"attention__qk_norm": True},
    "latent, norms, YaRN": {
        "attention__q_rank": 5,
        "attention__qk_norm": True,
        "attention__rope__yarn_factor": 4.0,
        "attention__rope__original_length": 8,
    },
    "one block": {"attention__query_block": 64},
    "a block a token": {"attention__query_block": 1},
}
LENGTH = 13  # no multiple of the block of 4


@pytest.mark.parametrize("case", CASES)
def test_mla_equals_the_oracle(float64, case):
    config = small(**({"dim": 10, "attention__query_block": 4, "init_std": 0.5} | CASES[case]))
    a = config.attention
    module = widened(MLA(config, jax.random.key(0)))
    rng = np.random.default_rng(1)
    module = jax.tree.map(lambda p: p * jnp.asarray(rng.uniform(0.5, 1.5, p.shape)), module)  # norm weights other than 1
    batch = make_batch(config, sequences=2, length=LENGTH)
    x = rng.standard_normal((2, LENGTH, 10))
    got, told = jax.jit(lambda m, x: m(x, batch["positions"], batch["segment_ids"]))(module, jnp.asarray(x))

    names = ("query", "query_down", "query_norm", "query_up", "latent", "latent_norm", "expand", "out")
    p = {n: np.asarray(getattr(module, n)) for n in names if getattr(module, n) is not None}
    r = a.rope
    turns = rope_oracle.yarn_frequencies(a.rope_dim, r.theta, r.yarn_factor, r.original_length, r.beta_fast, r.beta_slow)
    rows = [
        oracle.mla(
            x[i],
            p,
            np.asarray(batch["positions"][i]),
            np.asarray(batch["segment_ids"][i]),
            nope=a.nope_dim,
            rope=a.rope_dim,
            value=a.value_dim,
            kv_rank=a.kv_rank,
            eps=1e-20,
            frequencies=turns,
            temperature=(0.1 * math.log(r.yarn_factor) + 1) ** 2,
            qk_scales=None if module.qk_scales is None else np.asarray(module.qk_scales),
        )
        for i in range(2)
    ]
    assert relative(got, np.stack([out for out, _ in rows])) < 1e-12
    assert float(told.max_logit) == pytest.approx(max(top for _, top in rows), rel=1e-12)


def test_only_distances_between_positions_matter(float64):
    config = small(init_std=0.5)
    module, batch = widened(MLA(config, jax.random.key(0))), make_batch(config, documents=False)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 16, 16)))
    run = jax.jit(lambda positions: module(x, positions, batch["segment_ids"])[0])
    near, far, stretched = (run(p) for p in (batch["positions"], batch["positions"] + 1000, batch["positions"] * 2))
    assert relative(far, near) < 1e-12
    assert relative(stretched, near) > 1e-3


def test_a_token_sees_itself_and_earlier_tokens_of_its_document_and_nothing_else():
    """Exactly zero gradients elsewhere, for every pair of positions."""
    config = small(init_std=0.5)
    module, segments = MLA(config, jax.random.key(0)), jnp.asarray([[1] * 6 + [2] * 7])
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 13, 16)), jnp.float32)
    positions = jnp.asarray([[*range(6), *range(7)]])
    jacobian = jax.jit(jax.jacrev(lambda x: module(x, positions, segments)[0][0].sum(axis=-1)))(x)[:, 0]
    seen = np.abs(np.asarray(jacobian)).max(axis=-1) > 0
    t = np.arange(13)
    wanted = (t[:, None] >= t) & (np.asarray(segments[0])[:, None] == np.asarray(segments[0]))
    assert np.array_equal(seen, wanted)
