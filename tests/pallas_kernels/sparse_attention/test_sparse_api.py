"""XLA's sparse attention against a dense mask in float64: every gradient, edges of shapes, determinism, memory, and bad input."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems_sparse import NAMES, check, errors, problem, run

from pallas_kernels.sparse_attention import NO_KEYS, sparse_mla
from pallas_kernels.visible import PAGE, Selected, Span, causal_span, tokens_of_pages

SHAPES = {
    "one chunk, keys gathered": {"chosen": 5},
    "one chunk, keys masked": {"chosen": 6},  # a quarter of them
    "ragged chunks": {"length": 29, "options": {"query_chunk": 8}},
    "decoding": {"length": 1, "keys": 50, "empty": False},
    "queries after a cache": {"length": 5, "keys": 37, "options": {"query_chunk": 2}},
    "pages": {"pages": True, "length": 3 * PAGE, "chosen": 2, "options": {"query_chunk": PAGE}},
    "ragged pages": {"pages": True, "length": 2 * PAGE + 9, "chosen": 2, "options": {"query_chunk": 1}},
    "pages, decoding": {"pages": True, "length": 1, "keys": 5 * PAGE + 3, "chosen": 2},
    "pages, few keys": {"pages": True, "length": 20, "chosen": 2},
}


@pytest.mark.parametrize("name", SHAPES)
def test_float64_equals_a_dense_mask(name, float64):
    shape = dict(SHAPES[name])
    options = shape.pop("options", {})
    check(problem(**shape, dtype=jnp.float64), 1e-13, **options)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)])
@pytest.mark.parametrize("pages", [False, True])
def test_rounding_is_that_of_the_type(dtype, tolerance, pages):
    check(problem(pages=pages, length=40, chosen=8, dtype=dtype), tolerance)


def test_all_keys_chosen_is_dense_attention(float64):
    """Every visible key selected: the same as softmax attention without any selection."""
    p = problem(length=17, chosen=17, empty=False, dtype=jnp.float64)
    a = p.arrays
    content, rotated = a["latent"][..., :16], a["latent"][..., 16:]
    keys, values = (jnp.einsum("btk,khd->bthd", content, a[up]) for up in ("key_up", "value_up"))
    logits = jnp.einsum("bshd,bthd->bhst", a["q_nope"], keys) + jnp.einsum("bshr,btr->bhst", a["q_rope"], rotated)
    j = jnp.arange(17)[None, None]
    seen = (j >= p.span.first[..., None]) & (j < p.span.stop[..., None])
    p_dense = jax.nn.softmax(jnp.where(seen[:, None], logits * p.scale, -jnp.inf), axis=-1)
    np.testing.assert_allclose(run(p)["out"], jnp.einsum("bhst,bthv->bshv", p_dense, values), rtol=1e-12, atol=1e-12)


def test_pages_equal_their_tokens():
    p = problem(pages=True, length=2 * PAGE + 5, chosen=2)
    as_tokens = replace(p, selected=tokens_of_pages(p.selected, p.span), pages=False)
    assert max(errors(run(p), run(as_tokens)).values()) < 1e-6


def test_queries_without_keys_are_zero_and_finite():
    p = problem(length=12)
    got = run(p)
    without = np.asarray(p.selected.count) == 0
    assert without.any()
    assert (
        (got["out"][without] == 0).all()
        and (got["d q_nope"][without] == 0).all()
        and (got["log_total"][without] == np.float32(NO_KEYS)).all()
    )
    assert all(np.isfinite(x).all() for x in got.values())
    none = replace(p, selected=Selected(jnp.zeros_like(p.selected.index), jnp.zeros_like(p.selected.count)))
    assert all((x == 0).all() for name, x in run(none).items() if name not in ("log_total", "top"))


def test_only_chosen_keys_matter():
    """The gradient of one query's output reaches its chosen keys and no other."""
    p = problem(length=16, batch=1, empty=False)

    def of(latent, query):
        return sparse_mla(*(p.arrays[n] for n in NAMES[:-1]), latent, p.selected, p.span, scale=p.scale).out[0, query].sum()

    gradient = jax.jit(jax.grad(of))
    for query in (0, 9, 15):
        reached = np.flatnonzero(np.abs(gradient(p.arrays["latent"], query)[0]).sum(axis=-1))
        np.testing.assert_array_equal(reached, p.selected.index[0, query, : p.selected.count[0, query]])


@pytest.mark.parametrize("pages", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_runs_are_the_same_bits(pages):
    p = problem(pages=pages, length=2 * PAGE + 3, chosen=8, batch=1)
    first, second = run(p, query_chunk=PAGE), run(p, query_chunk=PAGE)
    assert all((first[name] == second[name]).all() for name in first)


@pytest.mark.parametrize("pages", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gradients_summed_one_block_at_a_time_are_the_same(pages, monkeypatch):
    """As on a GPU, where the order of one scatter's additions is not fixed."""
    p = problem(pages=pages, length=70, chosen=5)
    monkeypatch.setattr("pallas_kernels.sparse_attention.xla.target", lambda: ("gpu", "some"))
    check(p, 1e-6)


def test_memory_does_not_grow_with_queries_times_keys():
    """Four times the queries and keys: temporaries stay below what gathering everything would take, and grow as the arguments do."""

    def temporaries(length):
        def gradients(*arrays):
            *arrays, index, count = arrays
            span = causal_span(jnp.zeros((1, length), jnp.int32))
            return jax.grad(lambda a: sparse_mla(*a, Selected(index, count), span, scale=1.0, query_chunk=16).out.sum())(tuple(arrays))

        shapes = ((1, length, 2, 8), (1, length, 2, 8), (16, 2, 8), (16, 2, 8), (1, length, 24))
        arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        chosen = (jax.ShapeDtypeStruct((1, length, 64), jnp.int32), jax.ShapeDtypeStruct((1, length), jnp.int32))
        return jax.jit(gradients).lower(*arrays, *chosen).compile().memory_analysis().temp_size_in_bytes

    small, large = temporaries(1024), temporaries(4096)
    assert large < 4096 * 64 * 24 * 4 / 4 and large < 4 * small


BAD = {
    "a flat q_nope": ({"q_nope": lambda x: x[0]}, r"q_nope has shape .*; \[B, S, H, D\]"),
    "integers": ({"q_nope": lambda x: x.astype(jnp.int32)}, "a floating type is needed"),
    "a flat key_up": ({"key_up": lambda x: x[0]}, r"\[K, H, D\], \[K, H, V\]"),
    "another rank": ({"latent": lambda x: x[..., 1:]}, r"latent is float32 \(2, 24, 19\); float32 \(2, 24, 20\)"),
    "latents of another type": ({"latent": lambda x: x.astype(jnp.bfloat16)}, "latent is bfloat16"),
    "heads that differ": ({"value_up": lambda x: x[:, 1:]}, "value_up is"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arrays_are_refused(name):
    changes, message = BAD[name]
    p = problem()
    arrays = p.arrays | {key: change(p.arrays[key]) for key, change in changes.items()}
    with pytest.raises(ValueError, match=message):
        sparse_mla(*(arrays[n] for n in NAMES), p.selected, p.span, scale=1.0)


def test_bad_selections_are_refused():
    p = problem(pages=True, length=70)
    arrays = [p.arrays[n] for n in NAMES]
    with pytest.raises(ValueError, match=r"selected.index is int32 \(2, 2, 2\); int32 \(2, 70, 2\)"):
        sparse_mla(*arrays, p.selected, p.span, scale=1.0)
    with pytest.raises(ValueError, match=r"span.first is float32"):
        sparse_mla(*arrays, p.selected, Span(p.span.first.astype(jnp.float32), p.span.stop), scale=1.0, pages=True)
    with pytest.raises(ValueError, match="must be positive"):
        sparse_mla(*arrays, p.selected, p.span, scale=1.0, pages=True, query_chunk=0)
    with pytest.raises(ValueError, match="the known ones are"):
        sparse_mla(*arrays, p.selected, p.span, scale=1.0, pages=True, implementation="cuda")
