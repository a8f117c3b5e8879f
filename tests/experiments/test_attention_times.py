"""Longer sequences from short programs, on costs that are known; and programs that really are the layer's parts."""

import jax
import jax.numpy as jnp
import pytest

from mhc_jax.experiments.attention_memory import LAYERS, Layer, layer_program, weigh_all
from mhc_jax.experiments.attention_modelled import CACHES, CHUNK, MEASURED, MODELLED, Program, build, drawn, model_all
from mhc_jax.experiments.attention_times import Times

WHOLE, DENSE_HEADS = MODELLED.whole, MODELLED.dense_heads


def known(pages=200.0):
    """Dense: 0.1 S + 1e-4 S^2 us for two heads; choice of pages a tenth of that for all; of tokens 50 + 0.01 T a chunk."""
    us = {Program("dense", s, s, DENSE_HEADS).key: 0.1 * s + 1e-4 * s * s for s in WHOLE}
    us |= {Program("select_pages", s, s).key: 0.01 * s + 1e-5 * s * s for s in WHOLE}
    us |= {Program("select_tokens", CHUNK, t).key: 50 + 0.01 * t for t in CACHES}
    us |= {Program("pages", CHUNK, CACHES[1]).key: pages, MODELLED.tokens.key: 450.0}
    kernel = {Program("pages", CHUNK, CACHES[1]).key: 0.6 * pages, MODELLED.tokens.key: 320.0}
    return {key: {"us": value, "problems": [], "kernel_us": kernel.get(key, value)} for key, value in us.items()}


def test_every_program_is_used():
    assert {program.key for program in MODELLED.programs} == set(known())


def test_laws_of_growth():
    times, s = Times(known()), 131_072
    assert times.dense(s) == pytest.approx(64 * (0.1 * s + 1e-4 * s * s))
    assert times.pages(s) == pytest.approx(0.01 * s + 1e-5 * s * s + 200 * s / 512)
    seen = sum(range(s // 16, s + 1, s // 16)) / 16  # keys that a chunk looks at, on average
    assert times.tokens(s) == pytest.approx((50 + 0.01 * seen + 0.4 * 200) * s / 512 + 320 * s / 32)
    assert times.tokens(4096) == pytest.approx((50 + 0.01 * 4096 + 0.4 * 200) * 8 + 320 * 128)


def test_break_even_is_where_the_times_meet_or_nowhere():
    times = Times(known(pages=20_000.0))
    here = times.break_even("pages")
    assert here is not None and times.pages(here) == pytest.approx(times.dense(here), rel=1e-6)
    # One more token: 64 (0.1 + 2e-4 s) of dense attention against 0.01 + 2e-5 s and its share of a chunk.
    assert times.position("pages") == pytest.approx((20_000 / 512 + 0.01 - 6.4) / (64 * 2e-4 - 2e-5), rel=1e-3)
    assert Times(known(pages=0.1)).break_even("pages") is None  # cheaper from the start


def test_what_has_no_valid_figure_has_no_time():
    found = known()
    found[Program("pages", CHUNK, CACHES[1]).key]["problems"] = ["refused"]
    del found[Program("dense", WHOLE[0], WHOLE[0], DENSE_HEADS).key]
    times = Times(found)
    assert times.pages(1000) is None and times.tokens(1000) is None and times.dense(1000) is None
    assert times.break_even("tokens") is None and Times(known()).tokens(1000) is not None


@pytest.mark.parametrize("program", MODELLED.programs, ids=lambda program: program.key)
def test_a_program_has_the_shapes_of_its_part(program):
    fn, args = build(program)
    out = jax.eval_shape(fn, *args)
    wanted = {
        "dense": lambda: (1, program.heads, program.queries, 128),
        "select_pages": lambda: (1, program.queries // 64, 32),
        "select_tokens": lambda: (1, program.queries, 2048),
        "pages": lambda: (1, program.queries, 128, 128),
        "tokens": lambda: (1, program.queries, 128, 128),
    }[program.part]()
    assert (out.index if program.part.startswith("select") else out).shape == wanted


def test_a_layer_chooses_and_attends_and_gives_gradients():
    layer = Layer("tokens", 4096, 4096, backward=True)
    fn, args = layer_program(layer)
    out, (gradients,) = jax.eval_shape(fn, *args)
    assert out.shape == (1, 4096, 128, 128)
    assert [g.shape for g in gradients] == [x.shape for x in args[0]]
    assert len({layer.key for layer in LAYERS}) == len(LAYERS)


def test_what_is_kept_is_not_asked_for_again(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("mhc_jax.experiments.attention_modelled.check_libtpu", lambda: None)
    monkeypatch.setattr("mhc_jax.experiments.attention_modelled._modelled", lambda p, t: asked.append((t, p.key)) or {"problems": ["x"]})
    monkeypatch.setattr("mhc_jax.experiments.attention_memory.check_libtpu", lambda: None)
    monkeypatch.setattr("mhc_jax.experiments.attention_memory._weighed", lambda layer, t: asked.append((t, layer.key)) or 1)
    for _ in range(2):
        model_all(tmp_path, lambda line: None)
        weigh_all(tmp_path, lambda line: None)
    assert len(asked) == len(set(asked)) == 3 * (len(MODELLED.programs) + len(LAYERS))


def test_without_the_compiler_what_is_there_is_told(tmp_path, monkeypatch):
    def missing():
        raise ValueError("no libtpu")

    monkeypatch.setattr("mhc_jax.experiments.attention_modelled.check_libtpu", missing)
    said: list[str] = []
    assert model_all(tmp_path, said.append) == {} and said == ["nothing is modelled: no libtpu"]


@pytest.mark.parametrize("program", MEASURED.programs, ids=lambda program: program.key)
def test_what_is_measured_has_keys_to_attend_to(program):
    _, args = build(program)
    given = drawn(program, args)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), given) == jax.tree.map(lambda x: (x.shape, x.dtype), args)
    if program.part == "dense":
        return
    assert given[-1].stop[0, -1] == program.keys and given[-1].stop[0, 0] == program.keys - program.queries + 1
    if not program.part.startswith("select"):
        index, count = given[-2]
        assert (count == index.shape[-1]).all() and (jnp.diff(index, axis=-1) > 0).all()
        assert index.min() >= 0 and index.max() < program.keys // (64 if program.part == "pages" else 1)
