"""The indexer's losses against numpy in float64, their gradients against JAX's of a dense formulation, and that attention gets none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from indexers import Indexer, Main, heads_first, indexer, logits_of, loss_of, main_attention, visible

from pallas_kernels.indexer import dense_indexer_loss, pieces, reference, sparse_indexer_loss
from pallas_kernels.indexer.divergence import divergence
from pallas_kernels.visible import PAGE, Selected, Span, causal_span, is_visible

LENGTH = 70


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks of keys in every test."""
    monkeypatch.setattr(pieces, "KEY_BLOCK", PAGE)


def problem(dtype=jnp.float32, batch=2, length=LENGTH) -> tuple[Indexer, Main]:
    """Self-attention over packed documents."""
    x = indexer(batch, length, length, 3, 8, dtype)
    segments = np.sort(np.random.default_rng(3).integers(0, 4, (batch, length)), axis=1)
    x = x._replace(span=causal_span(jnp.asarray(segments)), weight=3 * x.weight)
    return x, main_attention(batch, length, length, 4, 6, 2, 5, dtype)


def chosen(x: Indexer, top_k: int, seed=0) -> tuple[Selected, np.ndarray]:
    """Random visible keys, at most top_k of each query and none of some, and their mask [B, S, T]."""
    rng = np.random.default_rng(seed)
    seen = visible(x.span, x.k.shape[1])
    index, count = np.zeros((*seen.shape[:2], top_k), np.int32), np.zeros(seen.shape[:2], np.int32)
    mask = np.zeros_like(seen)
    for b, s in np.ndindex(count.shape):
        among = np.flatnonzero(seen[b, s])
        found = np.sort(rng.choice(among, min(top_k, len(among)), replace=False)) if s % 9 else among[:0]
        index[b, s, : len(found)], count[b, s], mask[b, s, found] = found, len(found), True
    return Selected(jnp.asarray(index), jnp.asarray(count)), mask


def dense(x: Indexer, main: Main, chunk=16):
    """The dense loss as a function of q, k and weight."""
    beside = heads_first(main)
    logits = np.where(visible(x.span, x.k.shape[1])[:, None], logits_of(main), -np.inf)
    log_total = jnp.asarray(np.log(np.exp(logits).sum(-1)), x.weight.dtype)
    return lambda *a: dense_indexer_loss(*a, **beside, log_total=log_total, first=x.span.first, scale=main.scale, query_chunk=chunk)


def sparse(x: Indexer, main: Main, selected: Selected, chunk=16):
    arrays = (main.q_nope, main.q_rope, main.key_up, main.latent)
    return lambda *a: sparse_indexer_loss(*a, *arrays, selected, scale=main.scale, query_chunk=chunk)


@pytest.mark.parametrize("chunk", [16, 512])
@pytest.mark.parametrize(("kind", "top_k"), [("dense", 1), ("sparse", 11), ("sparse", 30)])  # gathered; most keys masked
def test_losses_equal_numpy(kind, top_k, chunk):
    x, main = problem()
    selected, mask = chosen(x, top_k)
    f = dense(x, main, chunk) if kind == "dense" else sparse(x, main, selected, chunk)
    mask = visible(x.span, LENGTH) if kind == "dense" else mask
    np.testing.assert_allclose(jax.jit(f)(*x[:3]), loss_of(x, main, mask), rtol=2e-5)


@pytest.mark.parametrize(("kind", "top_k"), [("dense", 1), ("sparse", 11), ("sparse", 30)])
def test_gradients_equal_those_of_a_dense_formulation(kind, top_k, float64):
    """float64: the loss written down with everything at once and differentiated by JAX, at a cotangent that is not one."""
    x, main = problem(jnp.float64)
    selected, mask = chosen(x, top_k)
    f = dense(x, main) if kind == "dense" else sparse(x, main, selected)
    mask = visible(x.span, LENGTH) if kind == "dense" else mask
    logits = jnp.where(mask[:, None], logits_of(main), -1e300)
    p = jnp.where(mask, jax.nn.softmax(logits, axis=-1).mean(axis=1), 0)

    def written_down(q, k, weight):
        everything = Span(jnp.zeros(q.shape[:2], jnp.int32), jnp.full(q.shape[:2], LENGTH, jnp.int32))
        return reference.divergence(p, jnp.where(mask, reference.index_scores(q, k, weight, everything), -jnp.inf))

    got, wanted = (jax.jit(jax.value_and_grad(lambda *a, g=g: 2.5 * g(*a), argnums=(0, 1, 2)))(*x[:3]) for g in (f, written_down))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted)):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_attention_gets_exactly_no_gradient(kind):
    x, main = problem(length=20)
    if kind == "dense":
        log_total = jnp.zeros((2, 4, 20))
        beside = tuple(heads_first(main).values())

        def f(q, k, weight, main):
            return dense_indexer_loss(q, k, weight, *main[:4], main[4], x.span.first, scale=1.0)

        arrays = (*beside, log_total)
    else:
        arrays = main[:4]
        selected = chosen(x, 5)[0]

        def f(q, k, weight, main):
            return sparse_indexer_loss(q, k, weight, *main, selected, scale=1.0)

    of_indexer, of_main = jax.jit(jax.grad(lambda x, main: f(*x, main), argnums=(0, 1)))(x[:3], arrays)
    assert all(np.any(np.asarray(d)) for d in of_indexer)
    assert not any(np.any(np.asarray(d)) for d in of_main)


def test_gradients_in_bfloat16_are_those_of_float32_rounded():
    """Sums are float32; what is multiplied with keys and queries is rounded to bfloat16, as are the gradients of q and k."""
    x, main = problem(jnp.bfloat16)
    selected, _ = chosen(x, 11)
    wide, wide_main = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, (x, main[:4]))
    for f, g in ((dense(x, main), dense(wide, Main(*wide_main, main.scale))), (sparse(x, main, selected), None)):
        g = g or sparse(wide, Main(*wide_main, main.scale), selected)
        got, wanted = jax.jit(jax.grad(f, (0, 1, 2)))(*x[:3]), jax.jit(jax.grad(g, (0, 1, 2)))(*wide[:3])
        for a, b in zip(got, wanted):
            a, b = np.asarray(a, np.float32), np.asarray(b)
            assert np.linalg.norm(a - b) < 6e-3 * np.linalg.norm(b)


def test_an_indexer_that_agrees_with_attention_has_no_loss():
    """One head of attention, and one of the indexer with q = [q_nope, q_rope] scale, k = [k_nope, k_rope] and all products positive."""
    x, main = problem()
    positive = Main(*(jnp.abs(a) for a in main[:4]), main.scale)
    positive = positive._replace(q_nope=positive.q_nope[:, :, :1], q_rope=positive.q_rope[:, :, :1], key_up=positive.key_up[:, :1])
    beside = heads_first(positive)
    q = jnp.concatenate([positive.q_nope, positive.q_rope], axis=-1)
    k = jnp.concatenate([beside["k_nope"][:, 0], beside["k_rope"]], axis=-1)
    same = Indexer(q, k, jnp.full((*q.shape[:2], 1), positive.scale), x.span)
    selected, _ = chosen(x, 11)
    for f in (dense(same, positive), sparse(same, positive, selected)):
        assert abs(float(jax.jit(f)(*same[:3]))) < 1e-5 * LENGTH
        assert float(jax.jit(f)(same.q, same.k, 0.5 * same.weight)) > 0.1


def test_divergence_of_rows_by_hand():
    p = jnp.asarray([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [3.0, 1.0, 0.0, 0.0]])
    scores = jnp.asarray([[0.0, 0.0, 0.0, -jnp.inf], [-jnp.inf] * 4, [0.0, 0.0, -jnp.inf, -jnp.inf]])
    loss, d_scores = divergence(p, scores)
    np.testing.assert_allclose(loss, np.log(1.5) + 0.75 * np.log(1.5) + 0.25 * np.log(0.5), rtol=1e-6)
    np.testing.assert_allclose(d_scores, [[-1 / 6, -1 / 6, 1 / 3, 0], [0, 0, 0, 0], [-0.25, 0.25, 0, 0]], atol=1e-6)


def test_the_loss_of_a_query_depends_on_no_later_key():
    x, main = problem()
    half = LENGTH // 2
    f, g = dense(x, main), sparse(x, main, chosen(x, 11)[0])
    for loss in (f, g):
        whole = jax.jit(jax.grad(lambda k, loss=loss: loss(x.q, k, x.weight)))(x.k)
        assert np.all(np.isfinite(np.asarray(whole)))
    short = Indexer(x.q[:, :half], x.k[:, :half], x.weight[:, :half], Span(x.span.first[:, :half], x.span.stop[:, :half]))
    cut = Main(main.q_nope[:, :half], main.q_rope[:, :half], main.key_up, main.latent[:, :half], main.scale)
    mask = np.asarray(is_visible(x.span, LENGTH))
    rest = loss_of(x, main, mask & (np.arange(LENGTH) >= half)[None, :, None])
    np.testing.assert_allclose(jax.jit(dense(short, cut))(*short[:3]) + rest, jax.jit(f)(*x[:3]), rtol=2e-5)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_memory_of_a_loss_and_its_gradients_grows_with_a_chunk(kind, monkeypatch):
    """4096 tokens, 8 heads of both kinds, chunks of 128: a few arrays [128, 4096], or what is gathered for 128 queries."""
    monkeypatch.setattr(pieces, "KEY_BLOCK", 512)
    tokens, heads, size, rank, chosen_keys = 4096, 8, 16, 32, 64

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((1, *shape), dtype)

    x = (array(tokens, heads, size), array(tokens, size), array(tokens, heads))
    if kind == "dense":
        main = (array(heads, tokens, size), array(heads, tokens, 8), array(heads, tokens, size), array(tokens, 8), array(heads, tokens))
        bound = 8 * 128 * tokens * 4
        f = jax.grad(lambda x, main, first: dense_indexer_loss(*x, *main, first, scale=1.0, query_chunk=128))
        args = (x, main, array(tokens, dtype=jnp.int32))
    else:
        key_up = jax.ShapeDtypeStruct((rank, heads, size), jnp.float32)
        main = (array(tokens, heads, size), array(tokens, heads, 8), key_up, array(tokens, rank + 8))
        bound = 3 * 128 * chosen_keys * (rank + 8 + 2 * size + 3 * heads) * 4
        f = jax.grad(lambda x, main, selected: sparse_indexer_loss(*x, *main, selected, scale=1.0, query_chunk=128))
        args = (x, main, Selected(array(tokens, chosen_keys, dtype=jnp.int32), array(tokens, dtype=jnp.int32)))
    temporaries = jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes
    whole_arrays = tokens * heads * size * 4 * 3  # queries and their gradients, in another order
    assert temporaries < bound + whole_arrays


def test_what_does_not_fit_is_named():
    x, main = problem(length=20)
    selected = chosen(x, 5)[0]
    with pytest.raises(ValueError, match=r"latent has shape \(2, 20, 6\); \(2, 20, 7\) is needed"):
        sparse(x, main._replace(latent=main.latent[..., 1:]), selected)(*x[:3])
    with pytest.raises(ValueError, match="k_rope has shape"):
        beside = heads_first(main) | {"k_rope": main.latent}
        dense_indexer_loss(*x[:3], **beside, log_total=jnp.zeros((2, 4, 20)), first=x.span.first, scale=1.0)
