"""The whole engine against programs whose cost is known, through the real compiler. No TPU is needed."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import cost_programs as programs
import jax
import jax.numpy as jnp
import pytest
from cost_programs import LARGE_BYTES

from pallas_kernels.static_cost import CHIPS, chip_of, compile_for, cost, lower_for

V6E = "v6e:2x2"
SLOW = pytest.mark.slow


def kernels(found):
    return [row for row in found.operations if row.kind == "kernel"]


@pytest.fixture(scope="module")
def single():
    """One copy of the large array by one kernel."""
    return cost(programs.copy_large, LARGE_BYTES, V6E)


def test_a_copy_kernel_moves_its_bytes_in_the_time_they_take(single):
    assert single.valid
    assert single.hbm_bytes == LARGE_BYTES
    assert 1 <= single.over_floor < 1.001  # 2 MiB of 512 are filled and drained, overlapped with nothing but each other
    assert single.vmem_bytes == 2 * 2 * 512 * 1024 * 4  # input and output, double-buffered
    assert single.kernel_us == single.modelled_us
    assert single.compile_seconds > 0


@SLOW
def test_a_floor_above_the_bytes_is_refused():
    found = cost(programs.copy_large, LARGE_BYTES + 1, V6E)
    assert found.over_floor is None and not found.valid
    assert "below the floor" in found.problems[0]


def test_a_kernel_in_a_scan_costs_its_trips(single):
    found = cost(partial(programs.scan, 7), 7 * LARGE_BYTES, V6E)
    (kernel,) = kernels(found)
    assert found.valid and kernel.times == 7
    assert kernel.hbm_bytes == 7 * LARGE_BYTES
    assert kernel.modelled_us == pytest.approx(7 * single.kernel_us)
    assert found.hbm_bytes >= 7 * LARGE_BYTES  # XLA copies the carry beside it


def test_a_loop_in_the_kernel_whose_trips_depend_on_data_is_refused():
    found = cost(programs.dynamic_loop, programs.SMALL_BYTES, V6E)
    assert found.over_floor is None
    assert "trip count" in found.problems[0]


def test_a_kernel_in_shard_map_costs_one_device_its_shard(single):
    found = cost(partial(programs.sharded, 4), LARGE_BYTES // 4, V6E)
    assert found.valid
    assert found.hbm_bytes == LARGE_BYTES // 4
    assert found.modelled_us == pytest.approx(single.modelled_us / 4, rel=0.01)


@pytest.mark.parametrize("topology", ["v6e:2x2", *(pytest.param(name, marks=SLOW) for name in ("v5e:2x2", "v5p:2x2x1", "tpu7x:2x2x1"))])
def test_a_grid_declared_parallel_uses_every_core(topology):
    found = cost(partial(programs.copy_large, "parallel"), LARGE_BYTES, topology)
    assert found.hbm_bytes == LARGE_BYTES
    assert 1 <= found.over_floor < 1.003


@SLOW
def test_a_grid_not_declared_parallel_leaves_one_core_of_v5p_idle():
    found = cost(programs.copy_large, LARGE_BYTES, "v5p:2x2x1")
    assert found.hbm_bytes == LARGE_BYTES
    assert found.over_floor == pytest.approx(2, rel=0.01)


@SLOW
@pytest.mark.parametrize(
    ("build", "floor"),
    [
        (programs.copy_ragged, LARGE_BYTES),
        (programs.emit_pipeline, LARGE_BYTES),
        (programs.outer_axis, programs.OUTER_BYTES),
        (programs.twice, 2 * LARGE_BYTES),
        (programs.add_one, LARGE_BYTES),  # no kernel: XLA's own listing
    ],
)
def test_pipelines_that_memory_bounds(build, floor):
    found = cost(build, floor, V6E)
    assert found.hbm_bytes == floor
    assert 1 <= found.over_floor < 1.002


@SLOW
def test_several_compilations_at_once_do_not_disturb_each_other():
    with ThreadPoolExecutor(2) as pool:
        done = [pool.submit(cost, programs.outer_axis, programs.OUTER_BYTES, topology) for topology in ("v5e:2x2", V6E)]
        found = [future.result() for future in done]
    assert [one.topology for one in found] == ["v5e:2x2", V6E]
    assert [one.hbm_bytes for one in found] == [programs.OUTER_BYTES] * 2
    ratio = CHIPS["v6e"].hbm_bytes_per_second / CHIPS["v5e"].hbm_bytes_per_second
    assert found[0].modelled_us / found[1].modelled_us == pytest.approx(ratio, rel=0.01)


@SLOW
def test_dmas_that_nothing_overlaps_are_waited_for():
    found = cost(programs.manual_dma, LARGE_BYTES, V6E)
    (kernel,) = kernels(found)
    assert found.hbm_bytes == LARGE_BYTES
    assert kernel.stall_cycles == pytest.approx(LARGE_BYTES / CHIPS["v6e"].hbm_bytes_per_second * CHIPS["v6e"].clock_ghz * 1e9, rel=1e-3)
    assert 1.005 < found.over_floor < 1.05


@SLOW
def test_nested_scans_multiply(single):
    (kernel,) = kernels(cost(partial(programs.nested_scan, 2, 3), 6 * LARGE_BYTES, V6E))
    assert kernel.times == 6 and kernel.hbm_bytes == 6 * LARGE_BYTES


@SLOW
def test_a_while_loop_on_data_is_refused():
    found = cost(programs.while_loop, LARGE_BYTES, V6E)
    assert found.over_floor is None and "how often" in found.problems[0]


@SLOW
def test_of_a_conditional_the_costlier_branch_is_charged(single):
    found = cost(programs.conditional, LARGE_BYTES, V6E)
    assert found.hbm_bytes == 2 * LARGE_BYTES
    assert found.kernel_us == pytest.approx(2 * single.kernel_us)
    assert "costliest" in found.assumptions[0]


@SLOW
def test_a_collective_is_refused():
    found = cost(partial(programs.sharded, 4, reduced=True), LARGE_BYTES // 4, V6E)
    assert found.over_floor is None and "between devices" in found.problems[0]


@SLOW
def test_code_under_a_condition_on_data_is_charged_or_left_out():
    charged = cost(programs.data_condition, programs.SMALL_BYTES, V6E)
    left_out = cost(programs.data_condition, programs.SMALL_BYTES, V6E, rare=True)
    assert charged.modelled_us == charged.conditional_us == left_out.conditional_us
    body_us = 64 * 10 * 2 / CHIPS["v6e"].clock_ghz / 1e3  # ten trips of two operations that wait for each other
    assert charged.modelled_us > left_out.modelled_us + body_us
    assert "every time" in charged.assumptions[0] and "left out" in left_out.assumptions[0]


@SLOW
def test_work_in_a_loop_is_linear_in_its_trips():
    first, second, third = (
        cost(partial(programs.loop, trips), programs.SMALL_BYTES, V6E).operations[0].cycles for trips in (100, 200, 400)
    )
    assert third - second == 2 * (second - first)
    assert second - first >= 64 * 100 * 2  # an addition waits for a multiplication, no less than a bundle each


@SLOW
def test_a_matrix_product_runs_near_the_peak_of_the_matrix_units():
    size = 4096
    found = cost(partial(programs.matmul, size), 3 * size * size * 2, V6E)
    cycles = next(row.cycles for row in found.operations if row.kind == "xla")
    assert 0.85 < 2 * size**3 / CHIPS["v6e"].flops_per_cycle / cycles <= 1


def test_what_the_compiler_refuses_is_said():
    with pytest.raises(RuntimeError, match=r"compiling for v6e:2x2 failed: ValueError.*block shape"):
        cost(programs.not_a_block, programs.SMALL_BYTES, V6E)


@pytest.mark.parametrize("topology", ["v9:2x2", "v6e", "H100"])
def test_a_topology_that_is_not_known_is_refused(topology):
    with pytest.raises(ValueError, match="there is no topology"):
        cost(programs.copy_large, LARGE_BYTES, topology)


def test_a_dump_goes_to_an_empty_folder(tmp_path):
    (tmp_path / "old.txt").touch()
    with pytest.raises(ValueError, match="not empty"):
        cost(programs.copy_large, LARGE_BYTES, V6E, keep=tmp_path)


@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2"])
def test_compile_for_checks_without_costing(topology):
    fn, args = programs.copy_small()
    assert "tpu_custom_call" in compile_for(topology, fn, args).as_text()


def test_compile_for_lays_shards_over_devices():
    fn, args = programs.sharded(4)
    assert compile_for(V6E, fn, args).memory_analysis().argument_size_in_bytes == LARGE_BYTES // 2 // 4
    fn, args = programs.sharded(8)
    with pytest.raises(ValueError, match="laid out over 8 devices; v6e:2x2 has 4"):
        compile_for(V6E, fn, args)


@pytest.mark.parametrize("target", ["v5e:2x2", "tpu7x:2x2x1"])
def test_lower_for_finds_blocks_that_mosaic_rejects(target):
    fn, args = programs.copy_small()
    assert "tpu_custom_call" in lower_for(target, fn, args).as_text()
    with pytest.raises(ValueError, match="block shape"):
        lower_for(target, *programs.not_a_block())


@pytest.mark.parametrize("target", ["H100", "H200", "B200"])
def test_lower_for_knows_gpus(target):
    x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)
    assert "dot_general" in lower_for(target, lambda a: jnp.sin(a @ a), (x,)).as_text()


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_figures_of_chips_are_those_of_jax(chip):
    from jax.experimental.pallas import tpu as pltpu

    device = jax.sharding.AbstractDevice(device_kind=chip.device_kind, num_cores=chip.cores, platform="tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)):
        info = pltpu.get_tpu_info()
    assert info.mem_bw_bytes_per_second * chip.cores == pytest.approx(chip.hbm_bytes_per_second)
    assert info.vmem_capacity_bytes == chip.vmem_bytes
    peak = chip.flops_per_cycle * chip.clock_ghz * 1e9
    assert peak == pytest.approx(info.bf16_ops_per_second, rel=0.005)
    assert chip_of(f"{chip.name}:2x2") is chip
