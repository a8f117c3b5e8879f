"""The part of docs/add_a_residual_part.md, run from the page as a user's file, and what `register` refuses."""

import importlib.util
import os
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import BASE, make, make_batch, small

from mhc_jax.config import override
from mhc_jax.errors import UserError
from mhc_jax.nn.decoder import batch_loss, initial_router_bias
from mhc_jax.nn.residual.hc import HC
from mhc_jax.nn.residual.kinds import CONNECTIONS, register
from mhc_jax.residual_kinds import KINDS, ResidualKind
from mhc_jax.train.optimizer import update_mask

REPO = Path(__file__).parents[2]
NAME = "circulant"


def started(path: Path, words: list[str], **environment: str) -> str:
    """What the file writes when it is started with these words."""
    environment = os.environ | {"PYTHONPATH": str(REPO), "JAX_PLATFORMS": "cpu"} | environment
    done = subprocess.run([sys.executable, path, *words], env=environment, capture_output=True, text=True, timeout=600, cwd=path.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


def code() -> str:
    return (REPO / "docs" / "add_a_residual_part.md").read_text().split("```python\n")[1].split("```")[0]


@pytest.fixture
def registered(tmp_path):
    """The page's file, imported; the kind is forgotten afterwards."""
    path = tmp_path / f"{NAME}.py"
    path.write_text(code())
    runpy.run_path(str(path), run_name=NAME)
    yield
    del KINDS[NAME], CONNECTIONS[NAME]


def test_the_page_keeps_its_word():
    assert len(code().splitlines()) <= 40


@pytest.mark.slow
def test_the_pages_part_starts_as_the_plain_network_and_trains(registered):
    config = small(residual=NAME, num_layers=2, dense_layers=2)
    batch, bias = make_batch(config, sequences=4), initial_router_bias(config)
    optimizer = optax.adamw(1e-2, eps=1e-20, weight_decay=0.0)

    def loss(model):
        total, count, aux = batch_loss(model, batch, bias, trace=True)
        return total / count, aux.trace.res

    @jax.jit
    def step(model, state):
        (value, res), grads = jax.value_and_grad(loss, has_aux=True)(model)
        updates, state = optimizer.update(jax.tree.map(jnp.multiply, grads, update_mask(model)), state, model)
        return optax.apply_updates(model, updates), state, value, res

    start = model = make(config)
    state, losses = jax.jit(optimizer.init)(model), []
    for _ in range(6):
        model, state, value, res = step(model, state)
        losses.append(float(value))
    plain = jax.jit(lambda m: loss(m)[0])(make(small(residual="residual", num_layers=2, dense_layers=2)))
    assert losses[0] == pytest.approx(float(plain), rel=1e-6)
    assert np.isfinite(losses).all() and losses[-1] < losses[0] - 0.2
    for axis in (1, 2):
        assert np.abs(np.asarray(res).sum(axis=axis) - 1).max() < 1e-6
    moved = np.asarray(model.dense_layers.attention_connection.bias != start.dense_layers.attention_connection.bias)
    assert moved.tolist() == [[False] * 4 + [True] * 4 + [False] * 4, [True] * 12]  # the first sublayer learns its post alone


@pytest.mark.slow
def test_the_pages_file_is_a_command_line(tmp_path):
    path = tmp_path / f"{NAME}.py"
    path.write_text(code())
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text("".join(f"line {i} of text {number}\n" for i in range(100)))
    fields = {"num-layers": 2, "dim": 32, "vocab-size": 300, "dense-dim": 32, "moe.num-experts": 2, "moe.top-k": 1, "moe.expert-dim": 16}
    small_model = [word for name, value in fields.items() for word in (f"--model.{name}", str(value))]
    small_run = ["--train.steps", "2", "--train.batch-size", "2", "--train.eval-sequences", "2", "--data.seq-len", "32"]
    small_run += ["--train.eval-every", "2", "--train.checkpoint-every", "2", "--data.source", str(tmp_path / "*.txt")]
    words = ["ablate", "laptop", "--variants", NAME, *small_model, *small_run, "--out", str(tmp_path / "list")]
    started(path, words, MHC_JAX_CACHE=str(tmp_path / "cache"))
    report = (tmp_path / "list" / "report.md").read_text()
    assert f"| {NAME} |" in report and "not bounded" not in report
    assert (tmp_path / "list" / "figures").is_dir()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_the_pages_file_plans(tmp_path):
    """The process that compiles knows the part too."""
    path = tmp_path / f"{NAME}.py"
    path.write_text(code())
    fields = {"num-layers": 1, "dense-layers": 1, "dim": 128, "vocab-size": 256, "dense-dim": 128}
    words = [word for name, value in fields.items() for word in (f"--model.{name}", str(value))]
    small_run = ["--train.batch-size", "4", "--data.seq-len", "128"]
    assert "fits 16.00 GiB" in started(path, ["plan", "laptop", "--topology", "v5e:2x2", "--residual", NAME, *words, *small_run])


def test_a_kind_that_is_not_registered_is_refused_with_those_that_are():
    with pytest.raises(UserError, match=r"model.residual is 'circulant'; it must be one of residual, .*kromhc"):
        override(BASE, {"model.residual": NAME})


def test_a_name_is_not_given_twice():
    with pytest.raises(ValueError, match="'mhc' is the residual kind of MHC already"):
        register("mhc", HC, ResidualKind(lambda n: 0))
    with pytest.raises(ValueError, match="'my part' cannot name"):
        register("my part", HC, ResidualKind(lambda n: 0))
    assert "my part" not in KINDS
    register("hc", HC, KINDS["hc"])  # the same again, as when a notebook's cell is run twice
