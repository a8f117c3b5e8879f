"""Dense attention in plain XLA, and its specification: against float64 and central differences; who sees whom; what memory it needs."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_problems import NAMES, Problem, errors, first_of, oracle, problem, run
from small import directional

from pallas_kernels.attention import dense_attention, reference

TINY = {"width": 4, "rope": 2, "value": 3}


@pytest.mark.parametrize("query_block", [5, 64])
def test_float32_equals_the_specification_in_float64(query_block):
    p = problem(13, batch=2, documents=3, **TINY)
    found = errors(run(p, "xla", query_block=query_block), oracle(p))
    assert max(found.values()) < 2e-6, found


def test_bfloat16_is_rounded_where_matrix_units_round():
    p = problem(40, documents=2, dtype=jnp.bfloat16, width=16, rope=8, value=16)
    found = errors(run(p, "xla", query_block=16), oracle(p))
    assert max(found["log_total"], found["top"]) < 2e-6, found
    assert 1e-4 < max(found.values()) < 6e-3, found  # weights and results are rounded, 1.7e-3 each in this norm


def test_the_specification_by_hand(float64):
    """One query after the other, in NumPy."""
    p = problem(7, documents=2, seed=3, **TINY)
    q, r, k, s, v = (np.asarray(a, np.float64)[0] for a in p.args)
    out, log_total, top = reference.dense_attention(*(jnp.asarray(a, jnp.float64) for a in p.args), p.first, 0.3)
    for h in range(2):
        for i in range(7):
            keys = range(int(p.first[0, i]), i + 1)
            logits = np.array([0.3 * (q[h, i] @ k[h, j] + r[h, i] @ s[j]) for j in keys])
            weights = np.exp(logits) / np.exp(logits).sum()
            assert np.allclose(out[0, h, i], sum(w * v[h, j] for w, j in zip(weights, keys)), rtol=1e-12)
            assert log_total[0, h, i] == pytest.approx(math.log(np.exp(logits).sum()), rel=1e-12)
            assert top[0, h, i] == logits.max()


@pytest.mark.parametrize("which", range(5), ids=NAMES)
def test_gradients_equal_central_differences(float64, which):
    p = problem(9, documents=2, **TINY)
    args = [np.asarray(a, np.float64) for a in p.args]
    weight, direction = jnp.asarray(p.d_out, jnp.float64), np.random.default_rng(2).standard_normal(args[which].shape)

    @jax.jit
    def f(v):
        given = map(jnp.asarray, [*args[:which], v, *args[which + 1 :]])
        return (weight * dense_attention(*given, p.first, scale=0.7, query_block=4).out).sum()

    slope = float((np.asarray(jax.grad(f)(jnp.asarray(args[which]))) * direction).sum())
    assert slope == pytest.approx(directional(f, args[which], direction, 1e-3), rel=1e-8)


@pytest.mark.parametrize("function", ["xla", "reference"])
def test_a_query_sees_its_own_and_earlier_keys_of_its_document_and_nothing_else(function):
    """Exactly zero gradients elsewhere, for every pair of positions."""
    p, length = problem(13, heads=1, **TINY), 13
    first = jnp.asarray(first_of(length, 1, 3))

    def f(value):
        args = (*p.args[:4], value, first)
        if function == "reference":
            return reference.dense_attention(*args, 0.3).out[0, 0].sum(axis=-1)
        return dense_attention(*args, scale=0.3, query_block=5).out[0, 0].sum(axis=-1)

    seen = np.abs(np.asarray(jax.jit(jax.jacrev(f))(p.args[4]))[:, 0, 0]).max(axis=-1) > 0
    i = np.arange(length)
    assert np.array_equal(seen, (i[:, None] >= i) & (i[None] >= np.asarray(first[0])[:, None]))


def largest_intermediate(jaxpr) -> int:
    """Elements of the largest value that any equation of a jaxpr makes, inner jaxprs included."""
    largest = 0
    for eqn in jaxpr.eqns:
        largest = max([largest, *(math.prod(v.aval.shape) for v in eqn.outvars if hasattr(v.aval, "shape"))])
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                largest = max(largest, largest_intermediate(inner))
    return largest


def test_no_array_of_logits_for_all_pairs_of_4096_tokens_forward_or_backward():
    length, heads, block = 4096, 2, 512
    shapes = [(1, heads, length, 4), (1, heads, length, 2), (1, heads, length, 4), (1, length, 2), (1, heads, length, 3)]

    def loss(block, *args):
        return dense_attention(*args, jnp.zeros((1, length), jnp.int32), scale=1.0, query_block=block).out.sum()

    def largest(block):
        args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
        return largest_intermediate(jax.make_jaxpr(jax.grad(lambda *a: loss(block, *a), argnums=range(5)))(*args).jaxpr)

    assert largest(block) == heads * block * length
    assert largest(length) == heads * length * length  # the measure sees what is there


def bad(p: Problem, which: int, array) -> tuple:
    return *p.args[:which], array, *p.args[which + 1 :]


def test_what_does_not_fit_is_refused():
    p = problem(8, **TINY)
    options = {"scale": 1.0}
    with pytest.raises(ValueError, match=r"k_rope is float32 \(1, 8, 3\); float32 \(1, 8, 2\) is needed"):
        dense_attention(*bad(p, 3, jnp.zeros((1, 8, 3))), p.first, **options)
    with pytest.raises(ValueError, match="value is bfloat16"):
        dense_attention(*bad(p, 4, p.args[4].astype(jnp.bfloat16)), p.first, **options)
    with pytest.raises(ValueError, match=r"first is float32 .* int32"):
        dense_attention(*p.args, p.first.astype(jnp.float32), **options)
    with pytest.raises(ValueError, match="q_nope has type int32"):
        dense_attention(*bad(p, 0, jnp.zeros((1, 2, 8, 4), jnp.int32)), p.first, **options)
    with pytest.raises(ValueError, match=r"\[B, H, S, D\]"):
        dense_attention(*bad(p, 0, p.args[0][0]), p.first, **options)
    with pytest.raises(ValueError, match="must not be empty"):
        dense_attention(*(a[..., :0, :] for a in p.args), p.first[:, :0], **options)
    with pytest.raises(ValueError, match="query_block is 0"):
        dense_attention(*p.args, p.first, query_block=0, **options)
