"""GPU kernels of sparse attention, run on a Hopper GPU or interpreted on the CPU, and lowered for Hopper. Nothing here is timed."""

import dataclasses
import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper import INTERPRET, in_the_interpreter, on_hopper
from problems_sparse import check, problem

from pallas_kernels.gpu import gather, launch
from pallas_kernels.sparse_attention import NO_KEYS, gpu, sparse_mla, xla
from pallas_kernels.sparse_attention.gpu.backward import halves
from pallas_kernels.sparse_attention.gpu.sums import plus_shares
from pallas_kernels.static_cost import compile_for, lower_for
from pallas_kernels.visible import PAGE, Selected, Span

BF16, F32, I32 = jnp.bfloat16, jnp.float32, jnp.int32
# bfloat16 operands: outputs and gradients are rounded once, 2e-3 in this norm, products of them twice, and latents' sum two of these.
TOLERANCE = {"o": 3e-3, "log_total": 1e-6, "top": 1e-6, "d_q": 4e-3, "o again": 3e-3, "d_latent": 5e-3}
SMALL = {"heads": 64, "rank": 128, "rope": 64, "nope": 8, "value": 6, "dtype": BF16, "batch": 1}


def chunk(pages: bool, queries: int, keys: int, heads: int = 64, rank: int = 128, batch: int = 1, seed: int = 0):
    """A chunk's arguments: q, latent, lists (and spans), d_o and a sum so far. All queries share a list of pages; a list may be short."""
    rng = np.random.default_rng(seed)

    def normal(*shape, dtype=BF16):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    q, latent = normal(batch, queries, heads, rank + 64), normal(batch, keys, rank + 64)
    lists, choices = (1, -(-keys // PAGE)) if pages else (queries, keys)
    most = max(2, choices * 3 // 4)
    index, count = np.zeros((batch, lists, most), np.int32), np.zeros((batch, lists), np.int32)
    for place in np.ndindex(batch, lists):
        count[place] = most if sum(place) % 2 == 0 else most // 3
        index[place][: count[place]] = np.sort(rng.choice(choices, count[place], replace=False))
    stop = rng.integers(keys // 2, keys + 1, (batch, queries))
    spans = [jnp.asarray(x, I32) for x in (stop - keys // 2, stop)] if pages else []
    lists = [jnp.asarray(index), jnp.asarray(count), *spans]
    return q, latent, lists, normal(batch, queries, heads, rank), normal(batch, keys, rank + 64, dtype=F32)


def both_ways(module, pages, q, latent, lists, d_o, so_far, **options):
    """Every result of a chunk, forward and backward, by name."""
    names = ("attend_pages", "attend_pages_backward") if pages else ("attend_tokens", "attend_tokens_backward")
    forward, backward = (partial(getattr(module, name), scale=0.1, **options) for name in names)
    o, log_total, top = forward(q, latent, *lists, rank=d_o.shape[-1])
    own = jnp.sum(o.astype(so_far.dtype) * d_o.astype(so_far.dtype), axis=-1)
    return dict(zip(TOLERANCE, (o, log_total, top, *backward(q, latent, *lists, log_total, own, d_o, so_far))))


def check_chunk(run, pages: bool, **shape) -> dict:
    """Holds what `run` of a chunk returns to XLA's path in float64, on the CPU: a GPU's has a way of its own to add gradients."""
    q, latent, lists, d_o, so_far = chunk(pages, **shape)
    got = jax.jit(run)(q, latent, lists, d_o, so_far)
    cpu = jax.devices("cpu")[0]
    with jax.enable_x64(True), jax.default_device(cpu):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (q, latent, d_o, so_far)]
        wanted = both_ways(xla, pages, wide[0], wide[1], jax.device_put(lists, cpu), *wide[2:])
    for name, tolerance in TOLERANCE.items():
        exact = np.asarray(wanted[name])
        error = np.linalg.norm(np.asarray(got[name], np.float64) - exact) / np.linalg.norm(exact)
        assert error < tolerance, f"{name}: {error:.2e}"
    return got


def check_kernels(pages: bool, **shape) -> dict:
    return check_chunk(partial(both_ways, gpu, pages, interpret=INTERPRET), pages, **shape)


@pytest.mark.parametrize(
    ("pages", "shape"),
    [
        pytest.param(False, {"queries": 1, "keys": 100}, marks=pytest.mark.slow),
        pytest.param(True, {"queries": 1, "keys": 150}, marks=pytest.mark.slow),
        pytest.param(False, {"queries": 3, "keys": 300, "heads": 128, "batch": 2}, marks=pytest.mark.matrix),
        pytest.param(True, {"queries": 3, "keys": 450, "heads": 128, "batch": 2}, marks=pytest.mark.matrix),
        pytest.param(False, {"queries": 2, "keys": 70, "heads": 128, "batch": 2}, marks=pytest.mark.slow),
        pytest.param(True, {"queries": 2, "keys": 70, "heads": 128, "batch": 2}, marks=pytest.mark.slow),
        pytest.param(False, {"queries": 1, "keys": 100, "rank": 512}, marks=pytest.mark.slow),
        pytest.param(True, {"queries": 2, "keys": 192, "rank": 256}, marks=pytest.mark.slow),
    ],
)
def test_a_chunk_equals_float64(pages, shape):
    """Lists that end within a tile, pages that end beyond the keys, latents that no query may see."""
    check_kernels(pages, **shape)


def test_one_query_forward_equals_float64():
    q, latent, lists, *_ = chunk(False, queries=1, keys=100)
    got = jax.jit(partial(gpu.attend_tokens, rank=128, scale=0.1, interpret=INTERPRET))(q, latent, *lists)
    with jax.enable_x64(True):
        wanted = xla.attend_tokens(*(jnp.asarray(np.asarray(x, np.float64)) for x in (q, latent)), *lists, rank=128, scale=0.1)
    for name, one, exact in zip(TOLERANCE, got, map(np.asarray, wanted)):
        error = np.linalg.norm(np.asarray(one, np.float64) - exact) / np.linalg.norm(exact)
        assert error < TOLERANCE[name], f"{name}: {error:.2e}"


@on_hopper
@pytest.mark.parametrize("pages", [False, True])
def test_the_published_sizes_equal_float64_and_two_runs_give_the_same_bits(pages):
    shape = {"pages": pages, "queries": 64 if pages else 200, "keys": 2800, "heads": 128, "rank": 512}
    first, second = check_kernels(**shape), check_kernels(**shape)
    assert all(np.array_equal(first[name], second[name]) for name in first)


@on_hopper
@pytest.mark.parametrize("keys", [2800, 2816])
def test_xla_goes_back_through_pages_as_float64_does_and_twice_alike(keys):
    """Also where the window of a short last page covers rows of the page before it."""
    first, second = (check_chunk(partial(both_ways, xla, True), True, queries=64, keys=keys, heads=128, rank=512) for _ in range(2))
    assert np.array_equal(first["d_latent"], second["d_latent"])


@pytest.mark.parametrize(("keys", "apart"), [(2800, False), (2816, True)])
def test_only_windows_that_lie_apart_are_called_so(keys, apart):
    """A GPU adds windows that are called unique without care for each other, and loses what two of them add to one row."""
    q, latent, lists, d_o, so_far = chunk(True, queries=64, keys=keys)
    own = jnp.zeros(q.shape[:3], F32)
    text = lower_for("H100", partial(xla.attend_pages_backward, scale=0.1), (q, latent, *lists, own, own, d_o, so_far)).as_text()
    (added,) = (line for line in text.splitlines() if "stablehlo.scatter" in line and "scatter_dims_to_operand_dims = [0]" in line)
    assert ("unique_indices = true" in added) == apart


@in_the_interpreter
@pytest.mark.matrix
@pytest.mark.parametrize("pages", [False, True])
def test_slots_are_refilled_without_races(pages, monkeypatch):
    """The interpreter follows what happens before what, and raises. Pages: enough queries that they take turns in a program's slots too."""
    interpreter = launch._interpreter
    monkeypatch.setattr(launch, "_interpreter", lambda: dataclasses.replace(interpreter(), detect_races=True))
    check_kernels(pages, queries=4 if pages else 1, keys=260 if pages else 500)


@pytest.mark.matrix
def test_all_of_it_equals_a_dense_mask_in_float64():
    """With the projections, several chunks, and a query without keys."""
    check(problem(length=5, keys=130, chosen=90, **SMALL), 1e-2, implementation="gpu", interpret=INTERPRET, query_chunk=4)


@pytest.mark.matrix
def test_a_query_without_keys_is_zero_and_its_gradients_are():
    q, latent, lists, d_o, so_far = chunk(False, queries=1, keys=70)
    got = jax.jit(partial(both_ways, gpu, False, interpret=INTERPRET))(q, latent, [lists[0], jnp.zeros_like(lists[1])], d_o, so_far)
    assert not np.asarray(got["o"], np.float32).any() and not np.asarray(got["d_q"], np.float32).any()
    np.testing.assert_array_equal(got["d_latent"], so_far)
    np.testing.assert_array_equal(got["log_total"], np.full((1, 1, 64), NO_KEYS, np.float32))


@pytest.mark.parametrize("swizzle", [64, 128])
def test_gathered_elements_lie_where_the_hardware_looks_for_them(swizzle):
    """Rows of `swizzle` bytes in blocks of eight; bits of the address from the seventh up are xored into those from the fourth up (PTX)."""
    rows, columns, width = 32, 192, swizzle // 2
    row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    plain = np.arange(rows * columns).reshape(rows // 8, columns // width, 8, width)
    plain = plain.transpose(0, 2, 1, 3).reshape(rows, columns) * 2  # bytes, without swizzling
    wanted = plain ^ (((plain >> 7) & (swizzle // 16 - 1)) << 4)
    np.testing.assert_array_equal(gather.place(row, column, columns, swizzle) * 2, wanted)
    # What the kernel takes to be constant for all threads: whole passes of rows, and 64 columns.
    first, second = gather.place(row[:16, :64], column[:16, :64], columns, swizzle), gather.place(16, 128, columns, swizzle)
    np.testing.assert_array_equal(gather.place(row[:16, :64] + 16, column[:16, :64] + 128, columns, swizzle), first + second)


@pytest.mark.parametrize(("rank", "columns"), [(512, 576), (128, 192), (256, 320), (384, 576)])
def test_columns_are_divided_without_gap_and_fit_registers(rank, columns):
    first, second = halves(rank, columns)
    ends = [0, *(end for _, end in first + second)]
    assert [start for start, _ in first + second] == ends[:-1] and ends[-1] == columns and rank in ends
    assert all(end - start <= 256 and start % 64 == 0 for start, end in first + second)
    assert max(sum(end - start for start, end in half) for half in (first, second)) <= 320


@pytest.mark.parametrize("pages", [False, True])
def test_shares_are_added_to_their_latents_and_nothing_else(pages):
    keys, entries = 130, 3
    shares = jnp.asarray(np.random.default_rng(0).integers(1, 9, (2, 2, entries if pages else 1, 64, 4)), F32)
    index, count = jnp.asarray([[[0, 1, 2], [1, 0, 0]], [[0, 2, 0], [0, 0, 0]]], I32), jnp.asarray([[3, 1], [2, 0]], I32)
    got = plus_shares(jnp.ones((2, keys, 4)), shares, index, count, pages)
    wanted = np.ones((2, keys, 4))
    for b, i in np.ndindex(2, 2):
        for e in range(int(count[b, i])):
            start, window = (int(index[b, i, e]) * PAGE, PAGE) if pages else (int(index[b, i, e]), 1)
            rows = np.asarray(shares[b, i, e] if pages else shares[b, i, 0, e : e + 1])
            wanted[b, start : start + window] += rows[: max(0, keys - start)]
    np.testing.assert_array_equal(got, wanted)


def published(pages: bool, length: int = 1024, heads: int = 128):
    """sparse_mla's output and gradients at the published sizes, and the shapes of its arguments."""

    def of(*shape, kind=BF16):
        return jax.ShapeDtypeStruct(shape, kind)

    lists, entries = (length // PAGE, 32) if pages else (length, 2048)
    arrays = (of(1, length, heads, 128), of(1, length, heads, 64), of(512, heads, 128), of(512, heads, 128), of(1, length, 576))
    chosen = (of(1, lists, entries, kind=I32), of(1, lists, kind=I32), of(1, length, kind=I32), of(1, length, kind=I32))

    def fn(arrays, index, count, first, stop):
        def run(arrays):
            return sparse_mla(*arrays, Selected(index, count), Span(first, stop), scale=0.1, pages=pages).out

        out, pull = jax.vjp(run, arrays)
        return out, pull(out)

    return fn, (arrays, *chosen)


@pytest.mark.parametrize("pages", [False, True])
def test_the_published_sizes_lower_to_one_kernel_forward_and_three_backward(pages):
    fn, args = published(pages)
    assert lower_for("H100", fn, args).as_text().count("@mosaic_gpu") == 4


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs JAX's CUDA plugin")
@pytest.mark.parametrize("pages", [False, True])
@pytest.mark.parametrize("chip", ["H100", "H200"])
def test_the_published_sizes_compile_and_a_chunk_keeps_to_its_memory(chip, pages):
    """512 queries of 128K keys: the latents' shares that are not yet added up stay within their bytes."""
    fn, args = published(pages)
    assert "mosaic_gpu" in (compile_for(chip, fn, args).as_text() or "")
    of = jax.ShapeDtypeStruct
    rows, queries, keys = (1, 512, 128), 512, 131072
    lists = [of((1, queries // PAGE, 32), I32), of((1, queries // PAGE), I32)] + [of((1, queries), I32)] * 2
    lists = lists if pages else [of((1, queries, 2048), I32), lists[-1]]
    backward = partial(gpu.attend_pages_backward if pages else gpu.attend_tokens_backward, scale=0.1)
    arrays = of((*rows, 576), BF16), of((1, keys, 576), BF16), *lists, of(rows, F32), of(rows, F32), of((*rows, 512), BF16)
    compiled = compile_for(chip, backward, (*arrays, of((1, keys, 576), F32)))
    assert compiled.memory_analysis().temp_size_in_bytes < gpu.SHARES_BYTES + (64 << 20)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": F32}, "the GPU kernels take bfloat16"),
        ({"heads": 8}, "there are 8 heads; the GPU kernels need a multiple of 64"),
        ({"rank": 64}, "K is 64 and R is 64; the GPU kernels need multiples of 128 and 64"),
    ],
)
def test_what_the_kernels_cannot_take_goes_to_xla_and_is_refused_by_name(changes, message):
    p = problem(length=2, keys=20, **(SMALL | changes))
    with pytest.raises(ValueError, match=message):
        sparse_mla(*p.arrays.values(), p.selected, p.span, scale=1.0, implementation="gpu", interpret=INTERPRET)
    text = lower_for("H100", lambda *a: sparse_mla(*a, p.selected, p.span, scale=1.0), tuple(p.arrays.values())).as_text()
    assert "@mosaic_gpu" not in text
