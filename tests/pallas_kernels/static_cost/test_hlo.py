"""Modules as XLA prints them for a TPU, cut to what matters."""

from pathlib import Path

import pytest

from pallas_kernels.static_cost import CHIPS
from pallas_kernels.static_cost.hlo import parse_module
from pallas_kernels.static_cost.model import model_cost

CHIP = CHIPS["v6e"]
SCOPED = '"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"4096"}]'
BODY = f'backend_config={{"window_config":{{"estimated_cycles":"1000"}},{SCOPED}}}'

SCAN = """HloModule jit_f, is_scheduled=true

%body (state: (s32[], f32[8192,1024], s32[])) -> (s32[], f32[8192,1024], s32[]) {{
  %constant.7 = s32[]{{:T(128)}} constant(1)
  %state = (s32[]{{:T(128)}}, f32[8192,1024]{{1,0:T(8,128)}}, s32[]{{:T(128)}}) parameter(0)
  %index = s32[]{{:T(128)}} get-tuple-element(%state), index=0
  %copy.2 = s32[]{{:T(128)S(6)}} copy(%index)
  %step = s32[]{{:T(128)}} get-tuple-element(%state), index=2
  %add.12 = s32[]{{:T(128)}} add(%copy.2, {step})
  %carry = f32[8192,1024]{{1,0:T(8,128)}} get-tuple-element(%state), index=1
  %fusion.1 = f32[8192,1024]{{1,0:T(8,128)}} fusion(%carry), kind=kLoop, calls=%fused, {body}
  ROOT %tuple = (s32[]{{:T(128)}}, f32[8192,1024]{{1,0:T(8,128)}}, s32[]{{:T(128)}}) tuple(%add.12, %fusion.1, %step)
}}

%condition (state.1: (s32[], f32[8192,1024], s32[])) -> pred[] {{
  %constant.8 = s32[]{{:T(128)}} constant(7)
  %state.1 = (s32[]{{:T(128)}}, f32[8192,1024]{{1,0:T(8,128)}}, s32[]{{:T(128)}}) parameter(0)
  %index.1 = s32[]{{:T(128)}} get-tuple-element(%state.1), index=0
  %limit = s32[]{{:T(128)}} get-tuple-element(%state.1), index=2
  ROOT %lt = pred[]{{:T(512)}} compare(%index.1, {bound}), direction={direction}
}}

ENTRY %main (n: s32[], x: f32[8192,1024]) -> f32[8192,1024] {{
  %n = s32[]{{:T(128)}} parameter(0)
  %constant.9 = s32[]{{:T(128)}} constant(0)
  %constant.3 = s32[]{{:T(128)}} constant(3)
  %x = f32[8192,1024]{{1,0:T(8,128)}} parameter(1), sharding={{replicated}}
  %start = s32[]{{:T(128)}} copy(%constant.9)
  %initial = (s32[]{{:T(128)}}, f32[8192,1024]{{1,0:T(8,128)}}, s32[]{{:T(128)}}) tuple(%start, %x, {third})
  %while = (s32[]{{:T(128)}}, f32[8192,1024]{{1,0:T(8,128)}}, s32[]{{:T(128)}}) while(%initial), condition=%condition, body=%body{known}
  ROOT %result = f32[8192,1024]{{1,0:T(8,128)}} get-tuple-element(%while), index=1
}}
"""


def scan(bound="%constant.8", step="%constant.7", third="%constant.3", direction="LT", known=""):
    return parse_module(SCAN.format(bound=bound, step=step, third=third, direction=direction, known=known, body=BODY))


def trips(module):
    (loop,) = [step for step in module.computations[module.entry] if step.opcode == "while"]
    return module.trip_count(loop, module.entry)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 7),
        ({"step": "%step"}, 3),  # 0, 3, 6
        ({"bound": "%limit"}, 3),
        ({"known": ', backend_config={"known_trip_count":{"n":"12"}}'}, 12),
        ({"bound": "%limit", "third": "%n"}, None),  # an argument of the program
        ({"step": "%step", "third": "%n"}, None),
        ({"step": "%copy.2"}, None),  # doubles
        ({"direction": "GT"}, None),
    ],
)
def test_trip_counts(changes, expected):
    assert trips(scan(**changes)) == expected


def test_a_loop_costs_its_body_times_its_trips():
    found = model_cost(scan(), {}, CHIP, "v6e:2x2", floor_bytes=1)
    assert found.modelled_us == pytest.approx(7 * 1000 / CHIP.clock_ghz / 1e3)
    assert [(row.name, row.kind, row.times) for row in found.operations] == [("fusion.1", "estimate", 7)]
    assert found.valid and found.hbm_bytes is None and found.vmem_bytes == 4096


def test_a_loop_of_unknown_length_has_no_ratio():
    found = model_cost(scan(bound="%limit", third="%n"), {}, CHIP, "v6e:2x2", floor_bytes=1)
    assert found.over_floor is None
    assert found.problems == ("how often the loop while runs is not known",)


def test_a_time_below_the_floor_has_no_ratio():
    us = 7 * 1000 / CHIP.clock_ghz / 1e3
    floor = round(us / 1e6 * CHIP.hbm_bytes_per_second)
    assert model_cost(scan(), {}, CHIP, "v6e:2x2", floor_bytes=floor - 100_000).over_floor == pytest.approx(1, abs=0.02)
    found = model_cost(scan(), {}, CHIP, "v6e:2x2", floor_bytes=floor + 100_000)
    assert found.over_floor is None and "below the floor" in found.problems[0]


def test_the_floor_is_what_takes_longer_of_bytes_and_flops():
    us = 7 * 1000 / CHIP.clock_ghz / 1e3  # 7000 cycles
    peak = CHIP.flops_per_cycle * CHIP.cores
    floor_bytes = round(us / 4 / 1e6 * CHIP.hbm_bytes_per_second)
    few = model_cost(scan(), {}, CHIP, "v6e:2x2", floor_bytes=floor_bytes, floor_flops=1000 * peak)
    assert few.floor_by == "bytes" and few.over_floor == pytest.approx(4, rel=1e-3)
    many = model_cost(scan(), {}, CHIP, "v6e:2x2", floor_bytes=floor_bytes, floor_flops=3500 * peak)
    assert many.floor_by == "flops" and many.over_floor == pytest.approx(2)
    found = model_cost(scan(), {}, CHIP, "v6e:2x2", floor_bytes=floor_bytes, floor_flops=7001 * peak)
    assert found.over_floor is None and "below the floor" in found.problems[0]


STRAIGHT = """HloModule jit_f, is_scheduled=true

%gather (y: f32[1024,1024]) -> f32[1024,1024] {{
  %y = f32[1024,1024]{{1,0:T(8,128)}} parameter(0)
  ROOT %all-gather = f32[1024,1024]{{1,0:T(8,128)}} all-gather(%y), dimensions={{0}}
}}

ENTRY %main (x: f32[1024,1024]) -> f32[1024,1024] {{
  %x = f32[1024,1024]{{1,0:T(8,128)}} parameter(0)
  %copy-start = (f32[1024,1024]{{1,0:T(8,128)S(1)}}, f32[1024,1024]{{1,0:T(8,128)}}, u32[]{{:S(2)}}) copy-start(%x)
  %copy-done = f32[1024,1024]{{1,0:T(8,128)S(1)}} copy-done(%copy-start)
  ROOT %last = f32[1024,1024]{{1,0:T(8,128)}} {last}
}}
"""


def test_a_prefetch_into_vmem_takes_the_time_of_its_bytes():
    last = f"fusion(%copy-done), kind=kLoop, calls=%fused, {BODY}"
    found = model_cost(parse_module(STRAIGHT.format(last=last)), {}, CHIP, "v6e:2x2", floor_bytes=1)
    transfer = 1024 * 1024 * 4 / CHIP.hbm_bytes_per_second * 1e6
    assert found.modelled_us == pytest.approx(transfer + 1000 / CHIP.clock_ghz / 1e3)


@pytest.mark.parametrize(("last", "moved"), [("transpose(%x), dimensions={1,0}", 1024), ("dynamic-update-slice(%x, %rows, %at, %at)", 8)])
def test_what_only_moves_is_charged_for_what_it_moves(last, moved):
    rows = "%rows = f32[8,1024]{1,0:T(8,128)} bitcast(%x)\n  %at = s32[] constant(0)\n  ROOT"
    text = STRAIGHT.format(last=last).replace("ROOT %last", rows + " %last")
    found = model_cost(parse_module(text), {}, CHIP, "v6e:2x2", floor_bytes=1)
    (row,) = [row for row in found.operations if row.name == "last"]
    assert found.valid and row.hbm_bytes == 2 * moved * 1024 * 4


def test_where_a_listing_cannot_be_run_the_compilers_estimate_stands_and_is_said():
    module = parse_module(STRAIGHT.format(last=f"fusion(%x), kind=kLoop, calls=%fused, {BODY}"))
    listings = {"last": (Path(__file__).parent / "recorded" / "dynamic_loop_v6e.txt").read_text()}
    found = model_cost(module, listings, CHIP, "v6e:2x2", floor_bytes=1)
    assert found.valid and found.hbm_bytes is None
    (row,) = [row for row in found.operations if row.name == "last"]
    assert row.kind == "estimate" and row.cycles == 1000
    assert "estimate" in found.assumptions[0] and "trip count" in found.assumptions[0]


@pytest.mark.parametrize(
    ("last", "problem"),
    [
        ("all-reduce(%copy-done), to_apply=%add", "between devices"),
        ("async-start(%copy-done), calls=%gather", "between devices"),
        ("sort(%copy-done), dimensions={0}", "neither a bundle listing nor an estimate"),
        ('custom-call(%copy-done), custom_call_target="tpu_custom_call"', "no bundle listing"),
    ],
)
def test_what_cannot_be_costed_is_refused(last, problem):
    found = model_cost(parse_module(STRAIGHT.format(last=last)), {}, CHIP, "v6e:2x2", floor_bytes=1)
    assert found.over_floor is None and problem in found.problems[0]


def test_bytes_below_the_floor_have_no_ratio():
    module = parse_module(STRAIGHT.format(last='custom-call(%x), custom_call_target="tpu_custom_call"'))
    listings = {"last": (Path(__file__).parent / "recorded" / "copy_v6e.txt").read_text()}
    moved = 2 * 512 * 128 * 4 + 1024 * 1024 * 4  # of the kernel, and of the prefetch beside it
    found = model_cost(module, listings, CHIP, "v6e:2x2", floor_bytes=moved)
    assert found.hbm_bytes == moved and found.over_floor >= 1
    found = model_cost(module, listings, CHIP, "v6e:2x2", floor_bytes=moved + 1)
    assert found.over_floor is None and "below the floor" in found.problems[0]


def test_text_that_is_no_module_is_refused():
    with pytest.raises(ValueError, match="no HLO module"):
        parse_module("0x1 : { }")
