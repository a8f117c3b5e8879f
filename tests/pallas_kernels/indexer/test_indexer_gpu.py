"""GPU kernels of the indexer, run on a Hopper GPU or interpreted on the CPU, and lowered for Hopper. Nothing here is timed."""

import dataclasses
import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper import INTERPRET, in_the_interpreter, on_hopper
from indexers import check_selected, indexer, largest, scores_of

from pallas_kernels.gpu import launch
from pallas_kernels.indexer import gpu, index_scores, select_pages, select_tokens, xla
from pallas_kernels.static_cost import compile_for, lower_for
from pallas_kernels.visible import Span

BF16 = jnp.bfloat16


def check_scores(got, wanted):
    """Products of bfloat16 are exact in float32, so what is lost is the sums' rounding."""
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(wanted))
    seen = np.isfinite(wanted)
    assert np.linalg.norm(np.asarray(got)[seen] - wanted[seen]) < 1e-6 * np.linalg.norm(wanted[seen])


def test_scores_equal_float64():
    """Fewer queries than a tile has, more keys than one, and a sequence of several documents."""
    x = indexer(1, 20, 300, 3, 128, BF16)
    check_scores(jax.jit(partial(gpu.index_scores, interpret=INTERPRET))(*x), scores_of(x))


@pytest.mark.slow
def test_scores_of_documents_equal_float64_and_page_scores_are_their_maxima():
    x = indexer(2, 70, 600, 3, 128, BF16)
    check_scores(jax.jit(partial(gpu.index_scores, interpret=INTERPRET))(*x), scores_of(x))
    got = jax.jit(partial(gpu.page_scores, query_chunk=64, interpret=INTERPRET))(*x)
    np.testing.assert_allclose(got, xla.page_scores(*x, 64), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_chosen_are_the_largest():
    x = indexer(1, 20, 300, 3, 128, BF16)
    got = select_tokens(*x, 50, implementation="gpu", interpret=INTERPRET)
    check_selected(got, largest(scores_of(x), 50), 50)
    by_page, wanted = (select_pages(*x, 3, implementation=name, interpret=INTERPRET and name == "gpu") for name in ("gpu", "xla"))
    np.testing.assert_array_equal(by_page.index, wanted.index)
    np.testing.assert_array_equal(by_page.count, wanted.count)


@on_hopper
def test_the_published_sizes_equal_float64():
    x = indexer(2, 500, 5000, 64, 128, BF16)
    check_scores(jax.jit(partial(gpu.index_scores, interpret=INTERPRET))(*x), scores_of(x))


@in_the_interpreter
@pytest.mark.slow
def test_slots_are_refilled_without_races(monkeypatch):
    """The interpreter follows what happens before what, and raises."""
    interpreter = launch._interpreter
    monkeypatch.setattr(launch, "_interpreter", lambda: dataclasses.replace(interpreter(), detect_races=True))
    x = indexer(1, 20, 200, 5, 128, BF16)
    check_scores(jax.jit(partial(gpu.index_scores, interpret=INTERPRET))(*x), scores_of(x))


def published(pages: bool):
    """The scores of 512 queries for 128K keys, 64 heads of 128."""

    def of(*shape, kind=BF16):
        return jax.ShapeDtypeStruct(shape, kind)

    args = of(1, 512, 64, 128), of(1, 131072, 128), of(1, 512, 64, kind=jnp.float32), Span(*[of(1, 512, kind=jnp.int32)] * 2)
    if pages:
        return (lambda q, k, weight, span: select_pages(q, k, weight, span, 32).index), args
    return index_scores, args


@pytest.mark.parametrize("pages", [False, True])
def test_the_published_sizes_lower_to_one_kernel(pages):
    assert lower_for("H100", *published(pages)).as_text().count("@mosaic_gpu") == 1


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs JAX's CUDA plugin")
@pytest.mark.parametrize("chip", ["H100", "H200"])
@pytest.mark.parametrize("pages", [False, True])
def test_the_published_sizes_compile(pages, chip):
    assert "mosaic_gpu" in (compile_for(chip, *published(pages)).as_text() or "")


def test_wide_heads_go_to_xla_and_are_refused_by_name():
    x = indexer(1, 16, 20, 2, 384, BF16)
    with pytest.raises(ValueError, match="I is 384; the GPU kernels take up to 256"):
        index_scores(*x, implementation="gpu", interpret=INTERPRET)
    assert "@mosaic_gpu" not in lower_for("H100", index_scores, tuple(x)).as_text()
