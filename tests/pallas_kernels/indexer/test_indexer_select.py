"""Scores and selection of the XLA path against numpy in float64: ties, packed documents, queries without keys, ragged sizes, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from indexers import Indexer, check_selected, indexer, largest, scores_of

from pallas_kernels import indexer as package
from pallas_kernels.indexer import pieces, reference, select
from pallas_kernels.visible import PAGE, Span

index_scores = jax.jit(package.index_scores)
select_tokens = jax.jit(package.select_tokens, static_argnames=("top_k", "query_chunk"))
select_pages = jax.jit(package.select_pages, static_argnames=("pages", "query_chunk"))
scores_by_reference = jax.jit(reference.index_scores)
tokens_by_reference = jax.jit(reference.select_tokens, static_argnums=1)
pages_by_reference = jax.jit(reference.select_pages, static_argnums=2)

SHAPES = [(2, 70, 150, 3, 8), (1, 1, 100, 4, 8), (3, 1, 130, 2, 4), (3, 5, 40, 1, 4)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks of keys in every test. What is traced is cached by shape: shapes here are traced with these blocks alone."""
    monkeypatch.setattr(pieces, "KEY_BLOCK", PAGE)


@pytest.mark.parametrize("shape", SHAPES)
def test_scores_equal_numpy(shape):
    x = indexer(*shape)
    wanted = scores_of(x)
    np.testing.assert_allclose(index_scores(*x), wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(scores_by_reference(*x), wanted, rtol=1e-5, atol=1e-6)


def test_bfloat16_is_summed_in_float32():
    x = indexer(2, 20, 90, 4, 16, jnp.bfloat16)
    got = index_scores(*x)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, scores_of(x), rtol=1e-5, atol=1e-6)


def integers(shape, seed=0) -> Indexer:
    """Scores that are small integers: many ties, and exact."""
    x = indexer(*shape, seed=seed)
    rng = np.random.default_rng(seed)
    return Indexer(*(jnp.asarray(rng.integers(-1, 2, a.shape), jnp.float32) for a in x[:3]), x.span)


@pytest.mark.parametrize(("top_k", "chunk"), [(1, 512), (17, 16), (17, 512), (200, 16)])
@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_equal_a_stable_sort(shape, top_k, chunk):
    x = integers(shape)
    got = select_tokens(*x, top_k, query_chunk=chunk)
    width = min(top_k, shape[2])
    check_selected(got, largest(scores_of(x), width), width)
    jax.tree.map(np.testing.assert_array_equal, got, tokens_by_reference(scores_by_reference(*x), top_k))


def test_all_equal_scores_select_the_first_visible_keys():
    x = indexer(2, 70, 150, 3, 8)
    zero = Indexer(x.q, x.k, 0 * x.weight * jnp.where(jnp.arange(70)[None, :, None] % 2 == 0, 1, -1), x.span)
    got = select_tokens(*zero, 9)
    count = np.minimum(np.asarray(x.span.stop - x.span.first), 9)
    wanted = [[list(range(f, f + c)) for f, c in zip(*rows)] for rows in zip(np.asarray(x.span.first).tolist(), count.tolist())]
    check_selected(got, wanted, 9)


def test_zeros_of_either_sign_and_numbers_that_are_not_are_ordered():
    """-0 ties with 0; NaN and -inf come after every other score, and before keys that are not visible."""
    row = [1.0, 0.0, -0.0, np.nan, -1.0, -0.0, 0.0, -np.inf]
    k = jnp.asarray([[[abs(v), 0, 0, 0] for v in row] + [[9.0, 0, 0, 0]] * 4])
    signs = jnp.asarray([[[1.0]]])
    same = Indexer(jnp.ones((1, 1, 1, 4)), k, signs, Span(jnp.zeros((1, 1), jnp.int32), jnp.full((1, 1), 8, jnp.int32)))
    check_selected(select_tokens(*same, 8), [[[0, 1, 2, 3, 4, 5, 6, 7]]], 8)
    minus = same._replace(weight=-signs)  # scores: -1, -0, -0, nan, -1, -0, -0, -inf
    check_selected(select_tokens(*minus, 3), [[[1, 2, 5]]], 3)
    check_selected(select_tokens(*minus, 7), [[[0, 1, 2, 3, 4, 5, 6]]], 7)


@pytest.mark.parametrize(("pages", "chunk"), [(1, 200), (2, 64), (9, 64)])
def test_pages_equal_a_stable_sort(pages, chunk):
    x = integers((2, 150, 300, 2, 6))
    check_pages(x, pages, select_pages(*x, pages, query_chunk=chunk))


def check_pages(x: Indexer, pages: int, got) -> None:
    scores, (batch, length, keys) = scores_of(x), scores_of(x).shape
    queries, total = -(-length // PAGE), -(-keys // PAGE)
    of_page = np.full((batch, queries, total), -np.inf)
    stop, first = np.asarray(x.span.stop), np.asarray(x.span.first)
    for b in range(batch):
        for s in range(length):
            for t in range(total):
                of_page[b, s // PAGE, t] = max(of_page[b, s // PAGE, t], scores[b, s, t * PAGE : (t + 1) * PAGE].max())
    for b in range(batch):
        for s in range(length):
            if stop[b, s] > first[b, s]:
                of_page[b, s // PAGE, (stop[b, s] - 1) // PAGE] = np.inf
    width = min(pages, total)
    check_selected(got, largest(of_page, width), width)
    jax.tree.map(np.testing.assert_array_equal, got, pages_by_reference(scores_by_reference(*x), x.span, pages))


def test_pages_of_a_single_query():
    """Decoding: the query's own page is chosen although its scores are the worst."""
    x = indexer(2, 1, 640, 2, 8)
    stop = jnp.asarray([[321], [65]], jnp.int32)
    k = x.k.at[0, 320].set(0).at[1, 64].set(0)
    x = Indexer(x.q, k, jnp.abs(x.weight), Span(jnp.zeros((2, 1), jnp.int32), stop))
    got = select_pages(*x, 3)
    assert 5 in got.index[0, 0] and got.index[1, 0].tolist() == [0, 1, 0] and got.count.tolist() == [[3], [2]]


def test_no_key_after_a_query_matters():
    """What a query cannot see is NaN: neither its scores nor what is selected for it change."""
    x = indexer(2, 70, 150, 3, 8)
    last = int(x.span.stop[:, :30].max())
    bad = x._replace(k=x.k.at[:, last:].set(jnp.nan))
    np.testing.assert_array_equal(index_scores(*bad)[:, :30], index_scores(*x)[:, :30])
    for got, wanted in zip(select_tokens(*bad, 20), select_tokens(*x, 20)):
        np.testing.assert_array_equal(got[:, :30], wanted[:, :30])


def test_selection_has_no_gradient_and_runs_the_same_twice():
    x = indexer(2, 70, 150, 3, 8)

    def f(q, k, weight):
        return jnp.sum(select_tokens(q, k, weight, x.span, 5).index * 1.0) + jnp.sum(select_pages(q, k, weight, x.span, 2).index * 1.0)

    for d in jax.grad(f, argnums=(0, 1, 2))(*x[:3]):
        assert not np.any(d)
    jax.tree.map(np.testing.assert_array_equal, select_tokens(*x, 5), select_tokens(*x, 5))


@pytest.mark.parametrize(("top_k", "chunk"), [(17, 16), pytest.param(60, 512, marks=pytest.mark.slow)])
def test_chunks_that_look_at_fewer_keys_choose_the_same(top_k, chunk, monkeypatch):
    """Ties, packed documents and a ragged end; some chunks look at no more keys than are chosen."""
    x = integers((2, 151, 151, 3, 8))
    whole = package.select_tokens(*x, top_k, query_chunk=chunk)
    monkeypatch.setattr(select, "LEAST", 32)
    assert select.ends_of(151) == [38, 76, 114, 151]
    jax.tree.map(np.testing.assert_array_equal, package.select_tokens(*x, top_k, query_chunk=chunk), whole)
    check_selected(whole, largest(scores_of(x), top_k), top_k)


def test_memory_grows_with_a_chunk_times_keys(monkeypatch):
    """At 4096 queries, 8192 keys, 16 heads: a few arrays of [256, 8192]. All scores would be 16 times one, all products 256 times."""
    monkeypatch.setattr(pieces, "KEY_BLOCK", 1024)
    array = jax.ShapeDtypeStruct
    span = Span(*(array((1, 4096), jnp.int32),) * 2)
    args = (array((1, 4096, 16, 32), jnp.float32), array((1, 8192, 32), jnp.float32), array((1, 4096, 16), jnp.float32), span)
    compiled = jax.jit(lambda *a: package.select_tokens(*a, 64, query_chunk=256)).lower(*args).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 6 * 256 * 8192 * 4
    compiled = jax.jit(lambda *a: package.select_pages(*a, 16, query_chunk=256)).lower(*args).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 256 * 8192 * 4


def test_rows_at_once_keeps_within_bounds():
    assert pieces.rows_at_once(512, 1, 131072) == 512
    assert pieces.rows_at_once(512, 1, 4 * 131072) == 128
    assert pieces.rows_at_once(512, 1 << 15, 1 << 7) == 16


BAD = {
    "q of three axes": (lambda x: x._replace(q=x.q[0]), r"\[B, S, J, I\]"),
    "k of another size": (lambda x: x._replace(k=x.k[..., 1:]), r"k has shape \(2, 9, 3\); \(2, 9, 4\) is needed"),
    "weights of other queries": (lambda x: x._replace(weight=x.weight[:, 1:]), "weight has shape"),
    "weights in bfloat16": (lambda x: x._replace(weight=x.weight.astype(jnp.bfloat16)), "weight is bfloat16; float32"),
    "k of another type": (lambda x: x._replace(k=x.k.astype(jnp.bfloat16)), "k is bfloat16"),
    "a span of floats": (lambda x: x._replace(span=Span(x.span.first * 1.0, x.span.stop)), "span is float32; int32"),
    "no keys": (lambda x: x._replace(k=x.k[:, :0]), "empty"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_named(name):
    change, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        index_scores(*change(indexer(2, 3, 9, 2, 4)))


def test_nothing_is_not_selected():
    with pytest.raises(ValueError, match="top_k is 0"):
        select_tokens(*indexer(2, 3, 9, 2, 4), 0)
