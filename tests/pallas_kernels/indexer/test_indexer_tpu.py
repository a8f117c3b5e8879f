"""The TPU kernels, interpreted on a CPU, against the XLA path: bfloat16 queries and keys of 128, sums in float32."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from indexers import Indexer, indexer, scores_of

from pallas_kernels import indexer as package
from pallas_kernels.indexer import tpu
from pallas_kernels.indexer.tpu import tile
from pallas_kernels.visible import Span

OPTIONS = {"implementation": "tpu", "interpret": True}
index_scores = jax.jit(partial(package.index_scores, **OPTIONS))
SIZE = 128


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles in small arrays."""
    monkeypatch.setattr(tile, "KEYS", 128)


def exact(x: Indexer) -> Indexer:
    """Queries and keys of few small integers, weights of quarters: sums are exact in any order, and many are equal."""
    rng = np.random.default_rng(5)
    q, k = ((rng.random(a.shape) < 0.1) * rng.integers(-2, 3, a.shape) for a in x[:2])
    weight = jnp.asarray(rng.integers(-4, 5, x.weight.shape) / 4, jnp.float32)
    return Indexer(jnp.asarray(q, jnp.bfloat16), jnp.asarray(k, jnp.bfloat16), weight, x.span)


@pytest.mark.parametrize("shape", [(2, 90, 300, 3), pytest.param((1, 16, 40, 17), marks=pytest.mark.slow)])
def test_scores_equal_float64(shape):
    x = indexer(*shape, SIZE, jnp.bfloat16)
    got = index_scores(*x)
    np.testing.assert_allclose(got, scores_of(x), rtol=1e-5, atol=2e-6)
    assert not np.any(np.signbit(got) & (np.asarray(got) == 0))


@pytest.mark.parametrize("cores", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("shape", [pytest.param((2, 150, 300, 2), marks=pytest.mark.slow), (2, 200, 200, 2)])
def test_selected_pages_are_those_of_xla(shape, cores, monkeypatch):
    """More queries than keys end a document, and self-attention, where what lies after the diagonal is left out."""
    monkeypatch.setattr(tile, "QUERY_BLOCK", 64)
    x = exact(indexer(*shape, SIZE, jnp.bfloat16))
    for pages in (2, 9):
        got = package.select_pages(*x, pages, **OPTIONS)
        jax.tree.map(np.testing.assert_array_equal, got, package.select_pages(*x, pages, implementation="xla"))


def test_selected_tokens_are_those_of_xla():
    x = exact(indexer(2, 150, 300, 2, SIZE, jnp.bfloat16))
    got = jax.jit(partial(package.select_tokens, top_k=40, query_chunk=64, **OPTIONS))(*x)
    jax.tree.map(np.testing.assert_array_equal, got, package.select_tokens(*x, 40, implementation="xla"))


def test_self_attention_sees_no_later_key_whatever_the_span_says():
    x = exact(indexer(1, 160, 160, 2, SIZE, jnp.bfloat16))
    wide = x._replace(span=Span(x.span.first, jnp.full_like(x.span.stop, 160)))
    for implementation in (OPTIONS, {"implementation": "xla"}):
        np.testing.assert_array_equal(package.index_scores(*wide, **implementation), package.index_scores(*x, implementation="xla"))


def test_what_the_kernels_cannot_take_is_named():
    x = indexer(1, 20, 40, 2, 64, jnp.bfloat16)
    with pytest.raises(ValueError, match="I is 64; the kernels need a multiple of 128"):
        package.index_scores(*x, **OPTIONS)
    with pytest.raises(ValueError, match="there are 3 queries; the kernels need 16"):
        package.index_scores(*indexer(1, 3, 40, 2, SIZE, jnp.bfloat16), **OPTIONS)
    with pytest.raises(ValueError, match="q is float32; the kernels take bfloat16"):
        package.index_scores(*indexer(1, 20, 40, 2, SIZE), **OPTIONS)


@pytest.mark.parametrize(("keys", "count"), [(5000, 300), pytest.param(4096, 256, marks=pytest.mark.slow)])
def test_the_largest_are_found_in_order(keys, count):
    """Rows of distinct scores, of few values, of one, of negative ones, with fewer than count that are not -inf, with extreme numbers."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 9, keys)).astype(np.float32)
    x[0, 1] = np.round(x[0, 1]) + 0.0
    x[0, 2] = 0
    x[0, 3, 100:] = -np.inf
    x[0, 4] = -np.inf
    x[0, 5] = -np.abs(x[0, 5])
    x[0, 6] = 0.0 - np.round(np.abs(x[0, 6]) * 2)
    x[0, 7] = np.where(np.arange(keys) % 2, np.finfo(np.float32).min, np.finfo(np.float32).max)
    x[0, 8, : count // 2], x[0, 8, count // 2 :] = np.finfo(np.float32).min, -np.inf
    got = jax.jit(partial(tpu.top_indices, count=count, interpret=True))(jnp.asarray(x))
    for row, found in zip(x[0], np.asarray(got)[0]):
        wanted = np.sort([t for t in np.argsort(-row, kind="stable")[:count] if row[t] > -np.inf])
        np.testing.assert_array_equal(found, np.pad(wanted, (0, count - len(wanted)), constant_values=keys).astype(int))
