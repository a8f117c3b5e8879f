"""The command `mhc-jax kernels`: its table, its JSON and its exit status. The engine has its own tests."""

import json

import jax
import jax.numpy as jnp
import pytest

from mhc_jax import cli, kernels
from pallas_kernels.case import Case
from pallas_kernels.static_cost import Cost
from pallas_kernels.static_cost import compile as compiling


def case(name="t8", **more):
    x = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    return Case(name, "double", "forward", lambda implementation: (lambda x: 2 * x, (x,)), 8192, "x read, 2 x written", **more)


def modelled(us, problems=(), **more):
    return Cost("v6e:2x2", us, us, 8192, 8192, 2.0, None if problems else us / 2.0, 3 << 20, problems=problems, **more)


@pytest.fixture
def engine(monkeypatch):
    """Stands in for the compiler: what it says of the kernel and of the XLA path."""
    answers = {"tpu": modelled(3.0), "xla": modelled(12.0)}

    def cost(build, floor_bytes, topology, *, floor_flops, rare):
        answer = answers[build.args[2]]
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(kernels, "cost", cost)
    monkeypatch.setattr(kernels, "families", lambda: {"toy": [case(), case("t16", rare="odd data")]})
    monkeypatch.setattr(kernels, "_accelerator", lambda: None)
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: name)
    return answers


def test_the_table_holds_both_paths(engine, capsys):
    assert cli.main(["kernels", "t8"]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert dict(zip(head.split(), row.split())) == {
        "kernel": "double/forward",
        "case": "t8",
        "chip": "v6e",
        "modelled_us": "3.0",
        "floor_us": "2.0",
        "floor_by": "bytes",
        "over_floor": "1.500",
        "vmem_mib": "3.0",
        "compile_s": "0.0",
        "xla_modelled_us": "12.0",
        "xla_over_floor": "6.000",
    }


def test_what_no_schedule_tells_is_not_modelled_and_the_reason_is_said(engine, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "families", lambda: {"toy": [case(), case("t16", unscheduled="the walk is data")]})
    assert cli.main(["kernels"]) == 0
    _, said, row = capsys.readouterr().out.splitlines()
    assert said == "  double: measured on an accelerator only; the walk is data" and "t8" in row


def test_topologies_and_json(engine, capsys, tmp_path):
    assert cli.main(["kernels", "toy/", "--topology", "v6e:2x2", "v5p:2x2x1", "--json", str(tmp_path / "k.json")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + 2 * 2
    record = json.loads((tmp_path / "k.json").read_text())
    assert [(row["case"], row["topology"]) for row in record["modelled"]] == [
        (name, topology) for topology in ("v6e:2x2", "v5p:2x2x1") for name in ("t8", "t16")
    ]
    assert record["modelled"][0]["pallas"]["modelled_us"] == 3.0 and record["modelled"][0]["xla"]["modelled_us"] == 12.0
    assert record["measured"] == []


@pytest.mark.parametrize("path", ["tpu", "xla"])
def test_a_figure_that_is_not_valid_is_not_shown_and_fails_the_command(engine, capsys, path):
    engine[path] = modelled(77.0, ("the trip count of a loop depends on data",))
    assert cli.main(["kernels", "t8"]) == 1
    said = capsys.readouterr().out
    assert "77" not in said
    assert "the trip count of a loop depends on data" in said


def test_a_program_that_does_not_compile_leaves_the_others(engine, capsys):
    engine["tpu"] = RuntimeError("compiling for v6e:2x2 failed: VMEM exhausted")
    assert cli.main(["kernels", "toy"]) == 1
    said = capsys.readouterr().out
    assert said.count("VMEM exhausted") == 2 and said.count("12.0") == 2


def test_code_under_conditions_on_data_is_reported(engine, capsys):
    engine["tpu"] = modelled(3.0, conditional_us=30.0)
    assert cli.main(["kernels", "toy"]) == 0
    first, second = (line for line in capsys.readouterr().out.splitlines() if "conditions" in line)
    assert "every time: 30.0 us" in first
    assert "left out (odd data); with it 30.0 us" in second


def test_on_an_accelerator_it_measures(engine, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "_accelerator", lambda: "tpu")
    monkeypatch.setattr(kernels, "measure_us", lambda fn, args: 4.0)
    monkeypatch.setattr(kernels, "measure_copy_bandwidth", lambda: 5e9)
    assert cli.main(["kernels", "t8", "--json", str(tmp_path / "k.json")]) == 0
    said = capsys.readouterr().out
    assert "measured_us" in said and "modelled_us" not in said
    (row,) = json.loads((tmp_path / "k.json").read_text())["measured"]
    assert row["measured_us"] == row["xla_measured_us"] == 4.0
    assert row["measured_floor_bytes_per_second"] == pytest.approx(8192 / 4e-6)
    assert row["measured_copy_bytes_per_second"] == 5e9
    assert not [key for key in row if "modelled" in key]


def test_a_case_that_cannot_be_measured_leaves_the_others(engine, capsys, monkeypatch, tmp_path):
    def measure(fn, args):
        raise ValueError("does not fit into shared memory\nand more")

    monkeypatch.setattr(kernels, "_accelerator", lambda: "gpu")
    monkeypatch.setattr(kernels, "measure_us", measure)
    monkeypatch.setattr(kernels, "measure_copy_bandwidth", lambda: 5e9)
    assert cli.main(["kernels", "toy", "--json", str(tmp_path / "k.json")]) == 0
    assert capsys.readouterr().out.count("  not measured, kernel: does not fit into shared memory\n") == 2
    rows = json.loads((tmp_path / "k.json").read_text())["measured"]
    assert len(rows) == 2 and all(row["measured_us"] is row["measured_floor_bytes_per_second"] is None for row in rows)


def test_what_a_user_can_put_right(engine, capsys, monkeypatch):
    assert cli.main(["kernels", "nothing"]) == 2
    assert "the cases are\n  toy/double/forward/t8" in capsys.readouterr().err
    assert cli.main(["kernels", "--topology", "v9:2x2"]) == 2
    assert "there is no topology 'v9:2x2'" in capsys.readouterr().err
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["kernels"]) == 2
    assert "pip install 'mhc-jax[tpu]'" in capsys.readouterr().err


def test_a_case_says_what_is_wrong_with_it():
    with pytest.raises(ValueError, match="direction is 'sideways'"):
        Case("t8", "double", "sideways", lambda implementation: None, 1, "x read")
    with pytest.raises(ValueError, match="floor_bytes is 0"):
        Case("t8", "double", "forward", lambda implementation: None, 0, "x read")
    with pytest.raises(ValueError, match="floor_flops is -1"):
        Case("t8", "double", "forward", lambda implementation: None, 1, "x read", floor_flops=-1)
    with pytest.raises(ValueError, match="floor_note is empty"):
        Case("t8", "double", "forward", lambda implementation: None, 1, "")
