"""Listings that the compiler dumped for programs of known work, run without the compiler."""

from pathlib import Path

import pytest

from pallas_kernels.static_cost import CHIPS
from pallas_kernels.static_cost.listing import parse_listing
from pallas_kernels.static_cost.machine import run_listing

RECORDED = Path(__file__).parent / "recorded"
TILES, TILE_BYTES = 64, 8 * 128 * 4
FREE = 1e12  # bytes a cycle: DMAs take no time


def run(name, *, bytes_per_cycle=FREE, **more):
    chip = CHIPS[name.rpartition("_")[2]]
    listing = parse_listing((RECORDED / f"{name}.txt").read_text())
    return run_listing(listing, bytes_per_cycle=bytes_per_cycle, branch_delay=chip.branch_delay, **more)


@pytest.mark.parametrize(("name", "size"), [("copy_v6e", TILES * TILE_BYTES), ("copy_tpu7x", 65536 * 1024 * 4)])
def test_a_copy_moves_every_tile_in_and_out_once(name, size):
    done = run(name)
    assert done.problems == ()
    assert done.hbm_bytes == 2 * size


def test_each_core_of_v5p_does_its_half_of_a_parallel_grid():
    halves = [run("copy_parallel_v5p", core=core) for core in (0, 1)]
    assert [half.hbm_bytes for half in halves] == [TILES * TILE_BYTES] * 2


@pytest.mark.parametrize("bytes_per_cycle", [1.0, 10.0])
def test_where_memory_is_slow_the_time_is_that_of_the_bytes(bytes_per_cycle):
    done, free = run("copy_v6e", bytes_per_cycle=bytes_per_cycle), run("copy_v6e")
    transfer = 2 * TILES * TILE_BYTES / bytes_per_cycle
    assert transfer <= done.cycles <= transfer + free.cycles / TILES * 3  # all but the first and the last tile's bundles are hidden
    assert done.cycles - done.stall_cycles == pytest.approx(free.cycles, abs=2 * TILE_BYTES / bytes_per_cycle)
    assert free.stall_cycles < 1e-3


def test_a_loop_takes_its_trips_times_the_latency_of_what_waits_in_it():
    done = run("loop_v6e")
    chained = TILES * 100 * 2  # a multiplication and an addition that depend on each other, a trip: no less than a bundle each
    assert chained < done.cycles < 10 * chained
    assert done.hbm_bytes == 2 * TILES * TILE_BYTES


def test_a_loop_whose_trips_depend_on_data_is_refused():
    (problem,) = run("dynamic_loop_v6e").problems
    assert "trip count" in problem


def test_code_under_a_condition_on_data_runs_every_time_or_never():
    always, never = run("data_condition_v6e"), run("data_condition_v6e", conditions=False)
    assert always.met_condition and never.met_condition
    assert always.problems == never.problems == ()
    body = TILES * 10 * 2  # ten trips of two operations that wait for each other
    assert always.cycles > never.cycles + body
    assert never.cycles == pytest.approx(run("copy_v6e").cycles, rel=0.35)


def test_the_work_of_the_last_step_is_charged_once():
    """A thousand trips in one of 64 steps: charged at every step they would be 64 times as many."""
    done = run("sum_blocks_v6e")
    trips = 1000 * 2
    assert trips < done.cycles < 12 * trips
    assert done.hbm_bytes == (TILES + 1) * TILE_BYTES
    assert not done.met_condition


def test_text_without_bundles_is_refused():
    with pytest.raises(ValueError, match="no packed bundles"):
        parse_listing("HloModule jit_f")


LOOP = """
   0   :  {{ %s1_s0 = smov 0 }}
 0x1 LB: > {{ %s2_s0 = sphi %s1_s0, %s3_s0 ;; %s3_s0 = sadd.s32 {step}, %s2_s0 }}
 0x2   : > {{ %p4_p0 = scmp.ge.s32.totalorder %s3_s0, {bound} /* loop exit test */ }}
 0x3   : > {{ %5 = sbr.rel (!%p4_p0) target bundleno = 1 (0x1), region = 7 }}
 0x4   : > {{}}
 0x5   : > {{}}
 0x6   :  {{ {extra} }}
"""


def run_text(text, **more):
    return run_listing(parse_listing(text), bytes_per_cycle=1.0, branch_delay=2, **more)


@pytest.mark.parametrize(("bound", "step", "trips"), [(1, 1, 1), (7, 1, 7), (7, 2, 4), (100, 33, 4)])
def test_cycles_of_a_loop_count_the_delay_of_its_branch(bound, step, trips):
    assert run_text(LOOP.format(bound=bound, step=step, extra="")).cycles == 1 + 5 * trips + 1


def test_the_naming_of_a_pointer_writes_no_register():
    """The counter's register is used again once the loop is left, by an operation that the loop's last trip already holds."""
    reuse = "%s6_s0 = sshll.u32 (%p4_p0), %s9_s4, 4 ;; %s7_s0 = int_to_ptr.vmem [resolvable:$true] %s6_s0"
    text = LOOP.format(bound=7, step=1, extra="%8 = dma.done.wait (%p4_p0), %s7_s0, 1").replace("0x4   : > {}", f"0x4   : > {{ {reuse} }}")
    done = run_text(text)
    assert done.cycles == 1 + 5 * 7  # the wait is on no semaphore that the text names
    assert "which semaphore" in done.problems[0]


def test_a_wait_that_nothing_ends_is_refused():
    (problem,) = run_text(LOOP.format(bound=3, step=1, extra="%8 = dma.done.wait [#allocation1], 16")).problems
    assert "another device" in problem


def test_a_dma_between_unknown_memories_is_refused():
    copy = "%8 = dma.general /*src=*/%s2_s0, /*size_in_granules=*/4, /*dst=*/%s2_s0, /*dst_syncflagno=*/[#allocation1]"
    (problem,) = run_text(LOOP.format(bound=3, step=1, extra=copy)).problems
    assert "between which memories" in problem
    done = run_text(LOOP.format(bound=3, step=1, extra=copy + " /* hbm-to-hbm */"))
    assert done.problems == () and done.hbm_bytes == 2 * 4 * 32
    pointers = "%s8_s1 = inlined_call_operand.hbm [shape: f32[64]] ;; %s9_s2 = scalar_lea.vmem [#allocation2], 0 ;; "
    done = run_text(LOOP.format(bound=3, step=1, extra=pointers + copy.replace("src=*/%s2_s0", "src=*/%s8_s1").replace("%s2_s0", "%s9_s2")))
    assert done.problems == () and done.hbm_bytes == 4 * 32


def test_an_operation_that_the_model_does_not_know_is_named():
    text = LOOP.format(bound=3, step=1, extra="").replace("sadd.s32 1,", "sfoo.s32 1,")
    (problem,) = run_text(text).problems
    assert "trip count" in problem and "sfoo.s32" in problem
