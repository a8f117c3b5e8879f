"""Topologies, collectives, products and the modelled time, on modules short enough to know what comes out."""

import pytest

from mhc_jax import configs
from mhc_jax.cli import main
from mhc_jax.config import override
from mhc_jax.errors import UserError
from mhc_jax.plan import compile
from mhc_jax.plan.collectives import cost_of, group_of, span_of
from mhc_jax.plan.compile import needed_bytes
from mhc_jax.plan.model import model_step
from mhc_jax.plan.plan import with_mesh
from mhc_jax.plan.products import flops_of, grouped_product
from mhc_jax.plan.topologies import KINDS, parse, slices_of
from pallas_kernels.static_cost import parse_module

SQUARE = tuple((x, y, 0) for y in range(4) for x in range(4))  # v5e:4x4


def test_every_listed_slice_has_the_chips_that_its_name_says():
    for kind in KINDS.values():
        sizes = [topology.chips for topology in slices_of(kind)]
        assert sizes == sorted(sizes)
    cube = parse("tpu7x:4x4x8")
    assert (cube.chips, cube.devices, cube.hbm_bytes_per_device) == (128, 256, 96 * 2**30)
    assert parse("v5p:4x4x8").kind.link_bytes_per_second == 100e9


@pytest.mark.parametrize("name", ["v9:2x2", "v5p", "v5p:3x3x3", "v5e:2x2x1"])
def test_unknown_slice_lists_the_known_ones(name):
    with pytest.raises(UserError, match=r"v5[pe]:.*, "):
        parse(name)


@pytest.mark.parametrize(
    ("attributes", "group"),
    [
        ("replica_groups={{0,4},{1,5}}", [0, 4]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", list(range(8))),
        ("source_target_pairs={{0,4},{4,0}}", [0, 4]),
        ("replica_groups={}", list(range(8))),
    ],
)
def test_groups_in_every_notation(attributes, group):
    assert group_of(attributes, 8) == group


def test_rings_carry_both_ways():
    ring = tuple((x, y, 0) for y in range(16) for x in range(16))
    assert span_of(list(range(16)), parse("v5e:16x16"), ring) == (2, 8, [16])
    assert span_of(list(range(256)), parse("v5e:16x16"), ring) == (4, 16, [16, 16])
    assert span_of(list(range(4)), parse("v5e:4x4"), SQUARE) == (1, 3, [4])
    assert span_of([0, 4, 8, 12], parse("v5e:4x4"), SQUARE) == (1, 3, [4])


HLO = """HloModule m, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inside (p0: bf16[4096,4096], p1: bf16[4096,4096]) -> bf16[4096,4096] {
  %p0 = bf16[4096,4096]{1,0} parameter(0)
  %p1 = bf16[4096,4096]{1,0} parameter(1)
  ROOT %conv = bf16[4096,4096]{1,0} convolution(%p0, %p1), dim_labels=bf_io->bf, metadata={op_name="jit(step)/jvp(attention)/dot"}
}

%body (s: (s32[], bf16[4096,4096])) -> (s32[], bf16[4096,4096]) {
  %s = (s32[], bf16[4096,4096]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = bf16[4096,4096]{1,0} get-tuple-element(%s), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %gather = bf16[4096,4096]{1,0} all-gather(%x), replica_groups={{0,1,2,3}}, dimensions={0}
  %product = bf16[4096,4096]{1,0} fusion(%gather, %x), kind=kOutput, calls=%inside, backend_config={"estimated_cycles":"1500000"}
  ROOT %t = (s32[], bf16[4096,4096]{1,0}) tuple(%next, %product)
}

%condition (s: (s32[], bf16[4096,4096])) -> pred[] {
  %s = (s32[], bf16[4096,4096]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] constant(7)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: bf16[4096,4096]) -> bf16[4096,4096] {
  %x = bf16[4096,4096]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %init = (s32[], bf16[4096,4096]{1,0}) tuple(%zero, %x)
  %loop = (s32[], bf16[4096,4096]{1,0}) while(%init), condition=%condition, body=%body
  %y = bf16[4096,4096]{1,0} get-tuple-element(%loop), index=1
  %start = (bf16[4096,4096]{1,0}, bf16[4096,4096]{1,0}) all-reduce-start(%y), replica_groups={{0,1,2,3}}, to_apply=%add
  %copied = bf16[4096,4096]{1,0} copy(%y), metadata={op_name="jit(step)/optimizer/copy"}
  %done = bf16[4096,4096]{1,0} all-reduce-done(%start)
  ROOT %out = bf16[4096,4096]{1,0} add(%done, %copied), metadata={op_name="jit(step)/optimizer/add"}
}
"""
SIZE = 2 * 4096**2


def test_loops_multiply_and_waits_show_what_is_not_hidden():
    topology = parse("v5e:4x4")
    step = model_step(parse_module(HLO), {}, topology, SQUARE)
    found = {operation.name: operation for operation in step.operations}
    link, hbm = 50e9, topology.kind.chip.hbm_bytes_per_second
    assert found["product"].part == "attention" and found["product"].times == 7
    assert found["product"].seconds == pytest.approx(7 * 1_500_000 / 1.5e9)
    assert found["product"].flops == 7 * 2 * 4096**3
    gather = SIZE * 3 // 4 / link + 3e-6
    assert found["gather"].waited == found["gather"].seconds == pytest.approx(7 * gather)
    # What runs between start and done hides that much of the all-reduce, and no more.
    copied = 2 * SIZE / hbm
    assert found["copied"].part == "optimizer" and found["copied"].seconds == pytest.approx(copied)
    assert found["start"].kind == "all-reduce" and found["start"].waited == pytest.approx(found["start"].seconds - copied)
    assert step.seconds == pytest.approx(sum(step.by_part().values()))


def test_rounds_that_balanced_routing_does_not_need_are_left_out_and_a_note_says_so():
    text = HLO.replace(
        "condition=%condition, body=%body", 'condition=%condition, body=%body, metadata={op_name="experts/further_rounds/while"}'
    )
    step = model_step(parse_module(text), {}, parse("v5e:4x4"), SQUARE)
    assert "product" not in {operation.name for operation in step.operations}
    assert any("uneven routing" in note for note in step.notes)


def test_collective_kinds_cost_what_the_model_says():
    module = parse_module(HLO)
    topology = parse("v5e:4x4")

    def seconds(text):
        (_, step), *_ = parse_module(f"ENTRY %m (x: f32[8]) -> f32[8] {{\n  {text}\n}}").instructions["m"].items()
        return cost_of(step, step, module, topology, SQUARE)

    group = "replica_groups={{0,1,2,3}}"
    scatter = seconds(f"ROOT %r = f32[1000000]{{0}} reduce-scatter(%x), {group}, to_apply=%add")
    assert scatter.bytes == 12_000_000 and scatter.seconds == pytest.approx(12e6 / 50e9 + 3e-6)
    away = seconds(f"ROOT %a = f32[1000000]{{0}} all-to-all(%x), {group}")
    assert away.bytes == 3_000_000 and away.seconds == pytest.approx(4 * 4e6 / (4 * 50e9) + 3e-6)
    alone = seconds("ROOT %r = f32[1000000]{0} all-reduce(%x), replica_groups={{0},{1}}, to_apply=%add")
    assert (alone.bytes, alone.seconds) == (0, 0.0)


def test_what_sparse_cores_do_runs_beside_the_core():
    """On TPU7x they gather, sum and exchange, and lay arrays out anew: calls that are started and waited for."""
    text = HLO.replace(
        "%copied =",
        """%cast = ((bf16[1024,4096]{1,0}, token[]), bf16[4096,4096]{1,0}) call-start(%y), async_execution_thread="sparsecore", to_apply=%sc
  %laid = ((bf16[4096,4096]{1,0}), bf16[4096,4096]{0,1}) call-start(%y), async_execution_thread="sparsecore", to_apply=%formatting
  %copied =""",
    ).replace(
        "ENTRY",
        """%sc (q: bf16[1024,4096]) -> bf16[4096,4096] {
  %q = bf16[1024,4096]{1,0} parameter(0)
  ROOT %got = bf16[4096,4096]{1,0} all-gather(%q), replica_groups={{0,1,2,3}}, dimensions={0}
}

%formatting (q: bf16[4096,4096]) -> bf16[4096,4096] {
  %q = bf16[4096,4096]{1,0} parameter(0)
  ROOT %turned = bf16[4096,4096]{0,1} copy(%q)
}

ENTRY""",
    )
    topology = parse("v5e:4x4")
    found = {operation.name: operation for operation in model_step(parse_module(text), {}, topology, SQUARE).operations}
    assert found["cast"].kind == "all-gather" and found["cast"].ici_bytes == SIZE * 3 // 4
    assert found["laid"].kind == "copy" and found["laid"].hbm_bytes == 2 * SIZE
    assert found["cast"].waited == found["laid"].waited == 0  # nothing waits for them here
    # A small collective of the core itself does not stand in line behind a large one of a sparse core.
    assert found["start"].waited == pytest.approx(found["start"].seconds - found["copied"].seconds)


def test_what_both_devices_of_a_chip_gather_crosses_its_links_once():
    topology = parse("tpu7x:4x4x4")
    chips = [(x, 0, 0) for x in range(4)]
    text = (
        "ENTRY %m (x: f32[8]) -> f32[8] {{\n  ROOT %r = bf16[4000000]{{0}} all-gather(%x), replica_groups={{{{{}}}}}, dimensions={{0}}\n}}"
    )

    def seconds(group: str, coordinates: list[tuple[int, ...]]) -> float:
        module = parse_module(text.format(group))
        (step,) = module.instructions["m"].values()
        return cost_of(step, step, module, topology, tuple(coordinates)).seconds - 2e-6  # two hops

    links = 2 * topology.kind.link_bytes_per_second  # a ring of four chips
    # Four devices, one a chip: what they receive passes links that another group of four shares. Eight, two a chip: once for both.
    assert seconds("0,1,2,3", chips) == pytest.approx(8e6 * 3 / 4 / (links / 2))
    assert seconds("0,1,2,3,4,5,6,7", [chip for chip in chips for _ in range(2)]) == pytest.approx(8e6 * 3 / 4 / links)


def test_batched_products_count_what_meets_data():
    text = """ENTRY %m (x: f32[8]) -> f32[8] {
  %a = bf16[8,2048,256]{2,1,0} parameter(0)
  %b = bf16[8,2048,512]{2,1,0} parameter(1)
  ROOT %c = bf16[8,256,512]{2,1,0} convolution(%a, %b), window={size=8 stride=7 lhs_dilate=8}, dim_labels=0fb_0io->0bf
}"""
    module = parse_module(text)
    assert flops_of(module.instructions["m"]["c"], "m", module) == 2 * 8 * 2048 * 256 * 512


def test_grouped_products_are_charged_for_a_tile_more_an_expert():
    text = """ENTRY %m (x: f32[8]) -> f32[8] {
  %x = bf16[4096,256]{1,0} parameter(0)
  %w = bf16[8,256,512]{2,1,0} parameter(1)
  ROOT %c = bf16[4096,512]{1,0} custom-call(%x, %w), metadata={op_name="a/grouped_matmul/pallas_call"}
}"""
    module = parse_module(text)
    found = grouped_product(module.instructions["m"]["c"], "m", module)
    assert found is not None and found.flops == 2 * 4096 * 256 * 512 and found.done == found.flops * 2


def test_room_that_balanced_routing_leaves_free_is_not_charged():
    text = """ENTRY %m (x: f32[8]) -> f32[8] {
  %x = bf16[5120,256]{1,0} parameter(0)
  %w = bf16[8,256,512]{2,1,0} parameter(1)
  %c = bf16[5120,512]{1,0} custom-call(%x, %w), metadata={op_name="transpose(first_round)/jvp(grouped_matmul)/pallas_call"}
  %sent = bf16[4096,512]{1,0} parameter(2)
  %there = bf16[5120,512]{1,0} ragged-all-to-all(%sent, %c), replica_groups={{0,1,2,3}}
  ROOT %back = bf16[4096,512]{1,0} ragged-all-to-all(%there, %sent), replica_groups={{0,1,2,3}}
}"""
    module = parse_module(text)
    found = grouped_product(module.instructions["m"]["c"], "m", module)
    assert found is not None and found.flops == 2 * 4096 * 256 * 512
    away, back = (module.instructions["m"][name] for name in ("there", "back"))
    moved = {cost_of(step, step, module, parse("v5e:4x4"), SQUARE).bytes for step in (away, back)}
    assert moved == {4096 * 512 * 2 * 3 // 4}


def test_the_rest_of_the_slice_goes_to_fsdp():
    config = with_mesh(override(configs.get("27b"), {"mesh.expert": 8}), 128, "a slice")
    assert (config.mesh.fsdp, config.mesh.expert) == (16, 8)
    given = override(configs.get("27b"), {"mesh.fsdp": 64})
    with pytest.raises(UserError, match="64 devices, fewer than the 128 of a slice"):
        with_mesh(given, 128, "a slice")
    with pytest.raises(UserError, match="64 devices, more than the 32 of a slice"):
        with_mesh(given, 32, "a slice")
    with pytest.raises(UserError, match="is 3, which does not divide the 128 devices"):
        with_mesh(override(configs.get("27b"), {"mesh.expert": 3, "train.batch_size": 1281, "train.eval_sequences": 3}), 128, "a slice")
    with pytest.raises(UserError, match=r"model\.dim|batch_size"):
        with_mesh(configs.get("27b"), 1024, "a slice")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["plan"], "name a config"),
        (["plan", "27b"], "name a slice"),
        (["plan", "27b", "--topology", "v5e:2x2", "--gpu", "h200"], "name a slice or --gpu"),
        (["plan", "27b", "--gpu", "z80"], "no GPU 'z80'"),
        (["plan", "27b", "--gpu", "h200", "--devices", "9"], "--devices is 9"),
        (["plan", "27b", "--topology", "v4:2x2"], "no topology 'v4:2x2'"),
        (["plan", "27b", "--topology", "v5e:2x2", "--residual", "mhc,moon"], "no residual kind 'moon'"),
        (["plan", "27b", "--topology", "v5e:2x2", "--residual", "mhc,mhc"], "names mhc twice"),
    ],
)
def test_command_says_what_is_wrong(args, said, capsys):
    assert main(args) == 2
    assert said in capsys.readouterr().err


def test_command_says_how_to_install_the_compiler(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["plan", "laptop", "--topology", "v5e:2x2"]) == 2
    assert "pip install 'mhc-jax[tpu]'" in capsys.readouterr().err


TINY = """--model.dim 256 --model.num-layers 3 --model.attention.nope-dim 128 --model.attention.rope-dim 64 --model.attention.value-dim 128
 --data.seq-len 256 --model.dtype bfloat16 --model.remat full --model.moe.expert-dim 128"""


@pytest.mark.slow
def test_plan_of_a_small_step(tmp_path, capsys):
    import json

    file = tmp_path / "plan.json"
    args = ["plan", "laptop", "--topology", "v5e:2x2", "--residual", "mhc,residual", "--json", str(file), *TINY.split()]
    assert main(args) == 0
    out = capsys.readouterr().out
    for word in ("fits 16.00 GiB", "residual connections", "all-gather", "model FLOPs utilisation", "overhead over the plain residual"):
        assert word in out
    mhc, plain = json.loads(file.read_text())["plans"]
    for plan in (mhc, plain):
        assert plan["fits"] and 0 < plan["mfu"] < 1
        assert sum(plan["modelled_seconds"].values()) == pytest.approx(plan["step_seconds"])
        # Every forward product runs once, again in the backward pass, and twice for its gradients; attention's are in its kernel.
        assert plan["products"]["recomputed"] < plan["products"]["products"]
        for part in ("attention", "experts", "dense feed-forward", "loss", "optimizer"):
            assert plan["modelled_seconds"][part] > 0
    assert mhc["modelled_seconds"]["residual connections"] > plain["modelled_seconds"].get("residual connections", 0)
    assert mhc["step_seconds"] > plain["step_seconds"]


def test_a_refusal_for_want_of_memory_is_read_however_early_it_comes():
    laid_out = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 96.50G of 95.74G hbm."
    early = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, memory required for HLO temporaries (136.5G) exceeds available HBM (95.74G)."
    assert needed_bytes(laid_out, arguments=2**30) == 96.5 * 2**30
    assert needed_bytes(early, arguments=2**30) == 137.5 * 2**30
    assert needed_bytes("INTERNAL: Mosaic failed to compile", arguments=0) is None


def test_a_killed_compiler_is_said(monkeypatch):
    monkeypatch.setattr(compile, "START", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(UserError, match="ran out of memory"):
        compile.compile_step(configs.get("laptop"), "v5e:2x2", lambda line: None)
