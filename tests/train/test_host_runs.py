"""Runs with Engram's tables in host memory: the training of tables on the device, cut, resumed and gone back with as that is."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import only

from mhc_jax.config import override
from mhc_jax.engram_config import EngramConfig
from mhc_jax.errors import Preempted, UserError
from mhc_jax.parallel.mesh import make_mesh
from mhc_jax.parallel.rules import Rules
from mhc_jax.tables import host
from mhc_jax.train import arrays, fits, loop
from mhc_jax.train.arrays import read
from mhc_jax.train.host_tables import HostTables, open_tables
from mhc_jax.train.loop import train
from mhc_jax.train.memory import to_plain
from mhc_jax.train.metrics import read_lines
from mhc_jax.train.programs import Programs
from mhc_jax.train.step import TrainState
from mhc_jax.train.watch import Spike, Watch

ENGRAM = EngramConfig(layers=(0, 1), table_sizes=(101, 211), heads=2, head_dim=4, conv=False)
NETWORK = {"model.residual": "residual", "model.dense_layers": 2}  # what compiles fast
STEPS = 6
HOT = 40
EMPTY = TrainState(*[None] * 6)


@pytest.fixture(scope="module", autouse=True)
def small_parts():
    """Checkpoints of several parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "PART_BYTES", 1000)
        yield


@pytest.fixture(scope="module", autouse=True)
def initial_once():
    """Runs that begin with the same values make them once."""
    known, make = {}, loop.placed_initial_state

    def remembered(config, mesh, rules):
        key = config.mesh, config.model
        if key not in known:
            known[key] = make(config, mesh, rules)
        return jax.tree.map(jnp.copy, known[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "placed_initial_state", remembered)
        yield


@pytest.fixture(scope="module")
def config_of(tiny):
    def made(placement, hot_rows=0, **changes):
        changed = {"model.engram": ENGRAM, **NETWORK, "train.steps": STEPS, "train.microbatches": 2, "train.keep_last": 9}
        config = override(tiny, changed)
        own = {"placement": placement, "hot_rows": hot_rows}
        return override(config, {**{f"model.engram.tables.{name}": value for name, value in own.items()}, **changes})

    return made


@pytest.fixture(scope="module")
def runs(config_of, compiled_once, tmp_path_factory):
    """Makes a run once and gives its config and folder."""
    known = {}

    def run(placement, hot_rows=0, **changes):
        key = (placement, hot_rows, *changes.items())
        if key not in known:
            made = config_of(placement, hot_rows, **changes), tmp_path_factory.mktemp("runs") / "run"
            train(*made, say=lambda line: None)
            known[key] = made
        return known[key]

    return run


def lines_of(folder, *names):
    return [[line[name] for name in names if name in line] for line in read_lines(folder / "metrics.jsonl")]


def tables_of(config, folder, step=STEPS):
    """Arrays of a checkpoint without what was needed to write them."""
    like = HostTables(config, make_mesh(config.mesh), Rules()).like(EMPTY).memory
    return jax.tree.leaves(read(folder / "checkpoints" / str(step) / "state", {"memory": to_plain(like)}))


def fingerprints(folder, step=STEPS):
    return json.loads((folder / "checkpoints" / str(step) / "about.json").read_text())["content"]["fingerprints"]


def cut(folder, copy, step):
    """The run as if it had been cut after a step."""
    shutil.copytree(folder, copy)
    (copy / "summary.json").unlink()
    for path in (copy / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)
    return copy


def same(got, wanted, config):
    """Rounding apart: of each update, at most as large as the rate of a step.

    The gate's square root has a slope without bound at zero, so that a token there turns rounding into much more of the gradient's norm
    (5e-4 seen where the losses were 5e-7 apart).
    """
    for name, rtol in (("loss", 2e-5), ("grad_norm", 2e-3)):
        np.testing.assert_allclose(*(np.concatenate(lines_of(folder, name)) for folder in (got, wanted)), rtol=rtol)
    rate = config.optimizer.learning_rate * config.model.engram.tables.learning_rate_factor
    found, expected, start = (tables_of(config, *of) for of in ((got,), (wanted,), (wanted, 2)))
    for a, b, before in zip(found, expected, start):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=rate * 2e-3)
        assert not np.array_equal(b, before)


@pytest.mark.slow
@pytest.mark.parametrize("hot_rows", only([HOT], [0, HOT]))
def test_a_run_is_that_of_tables_on_the_device(runs, hot_rows):
    config, folder = runs("host", hot_rows)
    same(folder, runs("device")[1], config)
    assert set(fingerprints(folder)) == set(fingerprints(runs("device")[1]))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["memory_bytes"] > 0
    assert summary["skipped_steps"] == 0


def test_the_first_values_are_those_of_a_table_on_the_device(config_of):
    configs = [config_of(placement) for placement in ("device", "host")]
    mesh, rules = make_mesh(configs[0].mesh), Rules()
    with jax.set_mesh(mesh), open_tables(configs[1], mesh, rules) as tables:
        wanted = loop.placed_initial_state(configs[0], mesh, rules).memory
        got = tables.saved(tables.start(EMPTY, [])).memory
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_a_cut_run_goes_on_bit_for_bit(runs, tmp_path):
    config, folder = runs("host", HOT)
    resumed = cut(folder, tmp_path / "run", 2)
    train(config, resumed, say=lambda line: None)
    assert lines_of(resumed, "loss", "grad_norm") == lines_of(folder, "loss", "grad_norm")
    assert fingerprints(resumed) == fingerprints(folder)


def test_sigterm_between_checkpoints_changes_no_bit(runs, tmp_path, monkeypatch):
    config, folder = runs("host", HOT)
    answers = iter([False, False, True])
    with monkeypatch.context() as patch:
        patch.setattr(loop.Preemption, "reached", lambda self: next(answers))
        with pytest.raises(Preempted, match="after step 3"):
            train(config, tmp_path / "run", say=lambda line: None)
    train(config, tmp_path / "run", say=lambda line: None)
    assert lines_of(tmp_path / "run", "loss", "grad_norm") == lines_of(folder, "loss", "grad_norm")
    assert fingerprints(tmp_path / "run") == fingerprints(folder)


@pytest.mark.slow
def test_a_step_is_compiled_for_every_size_and_once(config_of, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(host, "LEAST_COLD", 64)
    sizes, compile_step = [], Programs.compile_step

    wanted = runs("device")[1]

    def noted(self, state, batch, host):
        sizes.append(tuple(len(of_layer.cold) for of_layer in host))
        return compile_step(self, state, batch, host)

    monkeypatch.setattr(Programs, "compile_step", noted)
    config = config_of("host", **{"train.keep_last": 8})
    train(config, tmp_path / "run", say=lambda line: None)
    assert 1 < len(sizes) == len(set(sizes))
    same(tmp_path / "run", wanted, config)


ELSEWHERE = [(("device", 0), ("host", HOT)), (("host", HOT), ("device", 0)), (("device", 0), ("host", 0)), (("host", 0), ("host", HOT))]


@pytest.mark.slow
@pytest.mark.parametrize("way", only(ELSEWHERE[1:2], ELSEWHERE), ids=str)
def test_a_run_goes_on_with_its_tables_elsewhere(runs, tmp_path, way):
    before, after = way
    resumed = cut(runs(*before)[1], tmp_path / "run", 4)
    config = runs(*after)[0]
    train(config, resumed, say=lambda line: None)
    same(resumed, runs("device")[1], runs("host")[0])
    assert f'"placement": "{after[0]}"' in (resumed / "config.json").read_text()


def test_steps_that_are_skipped_leave_tables_alone(runs, config_of, tmp_path, monkeypatch):
    config = config_of("host", HOT, **{"train.max_nonfinite_steps": STEPS + 1})
    placed = loop.placed_initial_state

    def poison(*args):
        state = placed(*args)
        return state._replace(model=jax.tree.map(lambda x: x * np.nan, state.model))

    monkeypatch.setattr(loop, "placed_initial_state", poison)
    summary = train(config, tmp_path / "run", say=lambda line: None)
    assert summary["skipped_steps"] == STEPS
    first, last = (tables_of(config, tmp_path / "run", step) for step in (2, STEPS))
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh), open_tables(config, mesh, Rules()) as tables:
        start = jax.tree.leaves({"memory": to_plain(tables.saved(tables.start(EMPTY, [])).memory)})
    for a, b, c in zip(first, last, start, strict=True):
        np.testing.assert_array_equal(a, c)
        np.testing.assert_array_equal(b, c)


@pytest.mark.slow
@pytest.mark.parametrize("to_step", only([4], [0, 4]))
def test_a_run_goes_back_with_its_tables(runs, config_of, tmp_path, monkeypatch, to_step):
    """As a run with its tables on the device does that goes back from the same step."""
    after, folders = Watch.after, []
    for placement, hot_rows in (("device", 0), ("host", HOT)):
        config, left = config_of(placement, hot_rows, **{"train.rollback_deviations": 100.0}), [to_step + 1]

        def spike(self, step, loss, skipped, left=left):
            if step in left:
                left.remove(step)
                raise Spike(step, loss)
            after(self, step, loss, skipped)

        monkeypatch.setattr(Watch, "after", spike)
        folders.append(tmp_path / placement)
        assert train(config, folders[-1], say=lambda line: None)["rollbacks"] == 1
    same(folders[1], folders[0], runs("host")[0])


@pytest.mark.slow
@pytest.mark.parametrize("hot_rows", [0, HOT])
def test_eight_devices_train_as_one(runs, hot_rows, tmp_path):
    config, folder = runs("host", hot_rows, **{"mesh.data": 2, "mesh.fsdp": 4, "train.microbatches": 1})
    same(folder, runs("device")[1], runs("host")[0])
    resumed = cut(folder, tmp_path / "run", 4)
    train(config, resumed, say=lambda line: None)
    assert fingerprints(resumed) == fingerprints(folder)


@pytest.mark.slow
def test_the_other_optimizer_trains_as_on_the_device(runs):
    changes = {"model.engram.tables.optimizer": "row_second_moment"}
    config, folder = runs("host", HOT, **changes)
    same(folder, runs("device", **changes)[1], config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"placement": "host", "optimizer": "sinkhorn"}, 'placement is "host", but .* is "sinkhorn", which moves every row'),
        ({"hot_rows": 5}, 'hot_rows is 5, but .*placement is "device"'),
        ({"placement": "host", "hot_rows": 625}, "hot_rows is 625; 0 to 624 are supported"),
        ({"placement": "host", "hot_rows": -1}, "hot_rows is -1; 0 to 624 are supported"),
    ],
)
def test_configs_that_cannot_be_are_refused(config_of, changes, message):
    with pytest.raises(UserError, match=message):
        override(config_of("device"), {f"model.engram.tables.{name}": value for name, value in changes.items()})


def test_several_processes_are_refused(config_of, monkeypatch):
    config = config_of("host")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="needs a single process, but there are 2; set it to"):
        open_tables(config, make_mesh(config.mesh), Rules())


def test_tables_larger_than_the_machine_are_refused(config_of, monkeypatch):
    config = config_of("host")
    monkeypatch.setattr(fits, "device_bytes", lambda device: None)
    monkeypatch.setattr(fits, "machine_bytes", lambda: 2**20)
    with pytest.raises(UserError, match="for its tables in host memory"):
        fits.check_fits(override(config, {"model.engram.table_sizes": (10**6, 10**6)}), make_mesh(config.mesh))
