"""The TPU kernels step by step on a CPU: against float64, with documents, ragged lengths and stretches of queries; the walk over blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_problems import NAMES, Problem, errors, oracle, problem, run

from pallas_kernels.attention import dense_attention
from pallas_kernels.attention.tpu import backward, forward
from pallas_kernels.attention.tpu.blocks import Blocks, stretches

BLOCK, PART = 256, 128


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Many blocks without many tokens."""
    for module in (forward, backward):
        monkeypatch.setattr(module, "BLOCK", BLOCK)
        monkeypatch.setattr(module, "PART", PART)


def check(p: Problem, tolerance: float) -> None:
    found = errors(run(p, "tpu"), oracle(p))
    assert max(found.values()) < tolerance, found


def test_float32_with_documents_and_a_ragged_length():
    check(problem(500, documents=3), 2e-6)


def test_bfloat16_is_rounded_where_matrix_units_round():
    p = problem(256, documents=2, dtype=jnp.bfloat16, heads=1)
    found = errors(run(p, "tpu"), oracle(p))
    assert max(found["log_total"], found["top"]) < 2e-6, found
    assert max(found.values()) < 4e-3, found  # weights and gradients of logits, then results: 1.7e-3 each in this norm


@pytest.mark.slow
@pytest.mark.parametrize("length", [2, 128, 200, 256, 1024, 1025])
def test_any_length(length):
    check(problem(length, heads=1, batch=2), 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("documents", [1, 2, 40])
def test_other_widths_and_many_documents(documents):
    check(problem(800, documents=documents, width=256, rope=128, value=256), 2e-6)


@pytest.mark.parametrize("most", [512, pytest.param(256, marks=pytest.mark.slow)])
def test_queries_that_vmem_cannot_hold_are_done_in_stretches(monkeypatch, most):
    monkeypatch.setattr(backward, "_most_queries", lambda *args: most)
    check(problem(700, documents=2, heads=1), 2e-6)


@pytest.mark.parametrize("most", [pytest.param(10**6, marks=pytest.mark.slow), pytest.param(512, marks=pytest.mark.matrix)])
def test_gradients_of_some_heads_at_a_time_are_those_of_all(monkeypatch, most):
    """The same bits, but for the rotated key's, whose sum is taken in another order. In stretches or not."""
    monkeypatch.setattr(backward, "_most_queries", lambda *args: most)
    p = problem(150 if most > 512 else 700, batch=2, documents=2)
    whole = run(p, "tpu")
    monkeypatch.setattr(backward, "HEADS_BYTES", 1)
    some = run(p, "tpu")
    assert all(np.array_equal(whole[name], some[name]) for name in NAMES if name != "k_rope")
    assert errors({"k_rope": some["k_rope"]}, {"k_rope": whole["k_rope"]})["k_rope"] < 2e-7


@pytest.mark.slow
def test_two_runs_give_the_same_bits():
    p = problem(512, documents=2, dtype=jnp.bfloat16)
    first, second = run(p, "tpu"), run(p, "tpu")
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_nothing_comes_from_later_tokens_or_other_documents():
    """Changing keys and values that a query does not see changes no bit of what it gets."""
    p, cut = problem(600, heads=1), 300
    first = jnp.where(jnp.arange(600) >= cut, cut, 0)[None]
    options = {"scale": 0.1, "implementation": "tpu", "interpret": True}
    attend = jax.jit(lambda args: dense_attention(*args, first, **options).out)
    other = problem(600, heads=1, seed=1)

    def with_others(where):
        keep = {"k_nope": where[None, None, :, None], "k_rope": where[None, :, None], "value": where[None, None, :, None]}
        return tuple(jnp.where(keep[name], b, a) if name in keep else a for name, a, b in zip(NAMES, p.args, other.args))

    plain = np.asarray(attend(p.args))
    token = jnp.arange(600)
    later, earlier = (np.asarray(attend(with_others(where))) for where in (token >= 450, token < cut))
    assert np.array_equal(plain[:, :, :450], later[:, :, :450]) and not np.array_equal(plain[:, :, 450:], later[:, :, 450:])
    assert np.array_equal(plain[:, :, cut:], earlier[:, :, cut:]) and not np.array_equal(plain[:, :, :cut], earlier[:, :, :cut])


@pytest.mark.parametrize("count", range(1, 8))
def test_the_walk_visits_every_block_under_the_mask_once(count):
    """For queries in order of keys, from the first; for keys in order of queries, from the diagonal or the stretch's first on."""
    blocks = Blocks(count, BLOCK, PART)
    rows, steps = blocks.grid
    seen = [blocks.keys_of_queries(r, s) for r in range(rows) for s in range(steps)]
    seen = [(int(i), int(j)) for i, j, new in seen if new]
    runs = {i: [b for a, b in seen if a == i] for i in range(count)}
    assert runs == {i: list(range(i + 1)) for i in range(count)}
    assert [i for i, _ in seen] == sorted(
        (i for i, _ in seen), key=[i for i, _ in seen].index
    )  # a block of queries is never left and resumed
    for most in (1, 2, 3, count):
        total = []
        for part in stretches(blocks, most * BLOCK):
            rows, steps = part.grid
            found = [part.queries_of_keys(r, s) for r in range(rows) for s in range(steps)]
            found = [(int(i), int(j)) for i, j, new in found if new]
            order = [j for _, j in found]
            assert order == sorted(order, key=order.index)
            first, last = part.before, part.before + part.count
            assert {j: [a for a, b in found if b == j] for j in order} == {j: list(range(max(j, first), last)) for j in range(last)}
            total += found
        assert sorted(total) == [(i, j) for i in range(count) for j in range(i + 1)]


def test_what_the_kernels_cannot_take():
    p = problem(64, width=64)
    with pytest.raises(
        ValueError, match='D, R and V are 64, 64 and 128; the kernels need multiples of 128, 64 and 128; implementation "xla"'
    ):
        dense_attention(*p.args, p.first, scale=1.0, implementation="tpu", interpret=True)
    assert dense_attention(*p.args, p.first, scale=1.0).out.shape == (1, 2, 64, 128)
