"""The GPU kernels, run on a Hopper GPU or interpreted on the CPU, against float64, and compiled for Hopper. Nothing here is timed."""

import dataclasses
import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_problems import NAMES, SCALE, errors, first_of, oracle, problem, run
from hopper import INTERPRET, in_the_interpreter, on_hopper

from pallas_kernels.attention import dense_attention
from pallas_kernels.attention.gpu import backward
from pallas_kernels.attention.gpu.walk import TILE, Walk, ends, keys_of_queries, queries_of_keys
from pallas_kernels.gpu import launch
from pallas_kernels.static_cost import compile_for, lower_for

BF16 = jnp.bfloat16
# Weights and gradients of logits are rounded where they enter a product, then results: 1.7e-3 each in this norm.
TOLERANCE = {"out": 3e-3, "log_total": 2e-6, "top": 2e-6} | dict.fromkeys(NAMES, 4e-3)


def check(got, p) -> None:
    found = errors(got, {name: value for name, value in oracle(p).items() if name in got})
    assert all(found[name] < TOLERANCE[name] for name in found), found


def forward(p, **options):
    attend = jax.jit(lambda *args: dense_attention(*args, p.first, implementation="gpu", interpret=INTERPRET, **{"scale": SCALE} | options))
    return jax.tree.map(np.asarray, attend(*p.args)._asdict())


def test_forward_equals_float64():
    """A part of one tile, cut by a document's border."""
    p = problem(72, heads=1, documents=2, dtype=BF16)
    check(forward(p), p)


@pytest.mark.slow
def test_gradients_equal_float64(monkeypatch):
    """Two tiles; two heads in one program that owns keys, whose shares of the rotated key's gradient it adds up."""
    monkeypatch.setattr(backward, "MULTIPROCESSORS", 0)
    p = problem(140, documents=2, dtype=BF16)
    check(run(p, "gpu", INTERPRET), p)


@pytest.mark.matrix
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(("length", "documents"), [(600, 1), (600, 3), (500, 40), (256, 1), (31, 2)])
def test_any_length_and_any_documents(length, documents, together, monkeypatch):
    """Tiles that are seen in full, in part and not at all; slots that are used again; more than one sequence."""
    monkeypatch.setattr(backward, "MULTIPROCESSORS", 0 if together else 10**6)
    p = problem(length, batch=2, documents=documents, dtype=BF16)
    check(run(p, "gpu", INTERPRET), p)


@in_the_interpreter
@pytest.mark.matrix
def test_slots_are_refilled_without_races(monkeypatch):
    """The interpreter follows what happens before what, and raises."""
    interpreter = launch._interpreter
    monkeypatch.setattr(launch, "_interpreter", lambda: dataclasses.replace(interpreter(), detect_races=True))
    monkeypatch.setattr(backward, "MULTIPROCESSORS", 0)
    p = problem(600, documents=2, dtype=BF16)
    check(run(p, "gpu", INTERPRET), p)


@on_hopper
@pytest.mark.parametrize("documents", [1, 6])
def test_thousands_of_tokens_equal_float64_and_two_runs_give_the_same_bits(documents):
    p = problem(4168, heads=4, batch=2, documents=documents, dtype=BF16)
    first, second = run(p, "gpu", INTERPRET), run(p, "gpu", INTERPRET)
    check(first, p)
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.matrix
def test_two_runs_give_the_same_bits():
    p = problem(400, documents=2, dtype=BF16)
    first, second = run(p, "gpu", INTERPRET), run(p, "gpu", INTERPRET)
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.matrix
@pytest.mark.parametrize("scale", [-SCALE, 0.0])
def test_any_sign_of_the_scale(scale):
    """As if the queries had it; without any, every visible key weighs the same."""
    p = problem(150, heads=1, documents=2, dtype=BF16)
    turned = dataclasses.replace(p, args=tuple(x * np.sign(scale) if name[0] == "q" else x for name, x in zip(NAMES, p.args)))
    check(forward(p, scale=scale), turned)


@pytest.mark.matrix
def test_nothing_comes_from_later_tokens_or_other_documents():
    """Changing keys and values that a query does not see changes no bit of what it gets."""
    p, cut = problem(300, heads=1, dtype=BF16), 150
    p = dataclasses.replace(p, first=jnp.where(jnp.arange(300) >= cut, cut, 0)[None])
    other, token = problem(300, heads=1, dtype=BF16, seed=1), np.arange(300)

    def with_others(where):
        keep = {"k_nope": where[None, None, :, None], "k_rope": where[None, :, None], "value": where[None, None, :, None]}
        args = tuple(jnp.where(keep[name], b, a) if name in keep else a for name, a, b in zip(NAMES, p.args, other.args))
        return forward(dataclasses.replace(p, args=args))["out"]

    plain, later, earlier = forward(p)["out"], with_others(token >= 220), with_others(token < cut)
    assert np.array_equal(plain[:, :, :220], later[:, :, :220]) and not np.array_equal(plain[:, :, 220:], later[:, :, 220:])
    assert np.array_equal(plain[:, :, cut:], earlier[:, :, cut:]) and not np.array_equal(plain[:, :, :cut], earlier[:, :, :cut])


@pytest.mark.parametrize("passing", [32, 64, 128])
@pytest.mark.parametrize("documents", [1, 2, 3, 9, 100])
@pytest.mark.parametrize("owner", ["queries", "keys"])
def test_a_walk_visits_what_is_visible_once_and_the_rest_of_it_unmasked(owner, documents, passing):
    batch, tiles = 2, 5
    first = first_of(tiles * TILE, batch, documents)
    position = np.arange(tiles * TILE)
    seen = (position[None, None] <= position[None, :, None]) & (position[None, None] >= first[:, :, None])  # [B, queries, keys]
    if owner == "queries":
        table = keys_of_queries(jnp.asarray(first), passing)
    else:
        table, seen = queries_of_keys(ends(jnp.asarray(first)), passing), seen.swapaxes(1, 2)
    for row, (sequence, own) in enumerate(np.ndindex(batch, tiles)):
        walk = Walk.read(np.asarray(table), row, own, passing)
        starts = np.asarray(walk.start(np.arange(walk.steps)))
        pairs = seen[sequence, own * TILE : (own + 1) * TILE].reshape(TILE, -1, passing)
        assert sorted(starts) == list(passing * np.flatnonzero(pairs.any(axis=(0, 2))))
        assert pairs[:, starts[walk.masked :] // passing].all()
        assert set(starts[: walk.diagonal]) == set(range(own * TILE, (own + 1) * TILE, passing))  # every row sees something at once


@pytest.mark.parametrize(
    ("batch", "heads", "tiles", "wanted"), [(1, 128, 32, 4), (1, 128, 256, 8), (8, 6, 1024, 6), (1, 128, 2, 1), (2, 7, 64, 1)]
)
def test_heads_share_a_program_where_there_are_programs_enough(batch, heads, tiles, wanted):
    assert backward.heads_of_a_program(batch, heads, tiles) == wanted


def published(length: int, heads: int = 128, batch: int = 1, gradient: bool = True, dtype=BF16, width: int = 128):
    """Attention as a user writes it, without an implementation's name, and the shapes of its arguments."""

    def array(*shape, kind=dtype):
        return jax.ShapeDtypeStruct((batch, *shape), kind)

    q, r, value = array(heads, length, width), array(heads, length, 64), array(heads, length, 128)
    args = (q, r, q, array(length, 64), value, array(length, kind=jnp.int32))

    def fn(*args):
        attend = partial(dense_attention, scale=0.07)
        if not gradient:
            return attend(*args)
        out, pull = jax.vjp(lambda *floats: attend(*floats, args[5]).out, *args[:5])
        return out, pull(out)

    return fn, args


@pytest.mark.parametrize(("gradient", "kernels"), [(False, 1), (True, 3)])
def test_the_published_sizes_lower_to_one_kernel_forward_and_two_backward(gradient, kernels):
    fn, args = published(1000, gradient=gradient)
    assert lower_for("H100", fn, args).as_text().count("@mosaic_gpu") == kernels


def test_the_rotated_keys_gradient_does_not_exist_for_every_head():
    """32768 tokens of 128 heads: as [B, H, S, R] float32 it would take 1 GiB."""
    text = lower_for("H100", *published(32768)).as_text()
    assert f"tensor<{128 // backward.MOST_HEADS * 32768}x64xf32>" in text and f"tensor<{128 * 32768}x64xf32>" not in text


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs JAX's CUDA plugin")
@pytest.mark.parametrize("chip", ["H100", "H200"])
def test_the_published_sizes_compile_and_keep_to_their_memory(chip):
    compiled = compile_for(chip, *published(32768))
    assert "mosaic_gpu" in (compiled.as_text() or "")
    numbers = 3 * 128 * 32768 * 4  # log_total is kept, own and log_total to the base 2 are made of it
    assert compiled.memory_analysis().temp_size_in_bytes < numbers + (64 << 20)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": jnp.float32}, "the arrays are float32; the GPU kernels take bfloat16"),
        ({"width": 64}, "D, R and V are 64, 64 and 128; the GPU kernels take 128, 64 and 128"),
    ],
)
def test_what_the_kernels_cannot_take_goes_to_xla_and_is_refused_by_name(changes, message):
    p = problem(8, **{"dtype": BF16} | changes)
    with pytest.raises(ValueError, match=message):
        dense_attention(*p.args, p.first, scale=1.0, implementation="gpu", interpret=INTERPRET)
    fn, args = published(64, heads=2, gradient=False, **changes)
    assert "@mosaic_gpu" not in lower_for("H100", fn, args).as_text()
