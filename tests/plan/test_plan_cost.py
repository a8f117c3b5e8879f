"""Bills, traffic and the roofline of serving, by hand; and every published number that the arithmetic is held against."""

import math

import jax
import pytest

from mhc_jax.config import override
from mhc_jax.configs import get
from mhc_jax.configs.engram import ENGRAM
from mhc_jax.experiments.economics_checks import Check, checks
from mhc_jax.plan.cost import ACCELERATORS, matching_price, training_bill, utilisation
from mhc_jax.plan.flops import decode_flops
from mhc_jax.plan.serving import Service, compute_seconds
from mhc_jax.plan.traffic import LEVELS, best_block, engram_rows, kept_streams, stream_traffic, zipf_misses
from pallas_kernels.mhc.cases import cases

H800 = ACCELERATORS["H800"]


@pytest.mark.parametrize("check", checks(), ids=lambda check: f"{check.what}, {check.unit}")
def test_published(check: Check):
    print(f"{check.what}: {check.counted:.4g} counted, {check.published:g} published, {check.unit} ({100 * check.off:+.1f} %)")
    assert check.passes, (check.what, check.counted, check.published)


def test_a_check_that_is_off_does_not_pass():
    assert not Check("x", 104, 100, "", 0.03, "").passes
    assert Check("x", 104, 100, "", None, "").passes


@pytest.mark.parametrize(("name", "peak"), [("v5e", 197e12), ("v5p", 459e12), ("v6e", 918e12), ("tpu7x", 2307e12), ("H100", 989e12)])
def test_peaks_are_those_of_whole_chips(name, peak):
    chip = ACCELERATORS[name]
    assert chip.flops_per_second == pytest.approx(peak, rel=3e-3)
    assert 1.9 < chip.narrow_flops_per_second / chip.flops_per_second < 2.1


def test_a_bill_by_hand():
    """1 TFLOP a token, 3.6e9 tokens: 3.6e21 FLOPs, at half of 989 TFLOP/s 2022.2 hours."""
    bill = training_bill(1e12, 3.6e9, H800, mfu=0.5, dollars_per_hour=2)
    assert bill.chip_hours == pytest.approx(1e6 / 494.5) and bill.dollars == 2 * bill.chip_hours
    assert bill.days(10) == pytest.approx(bill.chip_hours / 240)
    assert matching_price(bill, bill.dollars) == pytest.approx(2)
    assert utilisation(1e12, 494.5, H800) == pytest.approx(0.5)


@pytest.mark.parametrize("mfu", [0, -1, 1.1])
def test_an_impossible_utilisation_is_refused(mfu):
    with pytest.raises(ValueError, match="MFU"):
        training_bill(1, 1, H800, mfu=mfu, dollars_per_hour=1)


def test_traffic_of_one_stream_is_the_least():
    for n in (1, 2, 4, 8):
        traffic = stream_traffic(n)
        assert traffic["plain"] < traffic["seam"] < traffic["fused"] < traffic["unfused"]
    assert kept_streams(4, 24, best_block(4, 24)) == 48
    assert abs(best_block(4, 60) - math.sqrt(4 * 60 / 6)) < 1


def test_a_seam_moves_what_the_kernels_arrays_hold():
    """Inputs and outputs of the library's own seam, at the width of DeepSeek-V3; coefficients and weights are 1 % at most."""
    case = next(case for case in cases() if (case.kernel, case.direction, case.name) == ("mhc_post_pre", "forward", "t8192_n4_c7168"))
    fn, args = case.build("xla")
    moved = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((args, jax.eval_shape(fn, *args))))
    assert 1 <= moved / (2 * 8192 * 7168) / stream_traffic(4)["seam"] < 1.01


def test_rows_and_levels_by_hand():
    rows = engram_rows(ENGRAM["27b"])
    assert (rows.rows, rows.row_bytes, rows.bytes) == (32, 160, 5120)
    assert rows.table_bytes == pytest.approx(5.792e9 * 2, rel=1e-3)
    hbm, host, _, drive = LEVELS
    assert host.tokens_per_second(rows) == 64e9 / (192 * 32)  # 160 bytes are three grains of 64
    assert hbm.tokens_per_second(rows) > host.tokens_per_second(rows) > drive.tokens_per_second(rows)
    assert drive.tokens_per_second(rows) == 2.5e6 / 32


@pytest.mark.parametrize("exponent", [0.8, 1.0, 1.2])
def test_misses_fall_to_none(exponent):
    n = 100_000
    weights = [k**-exponent for k in range(1, n + 1)]
    for cached in (0.001, 0.05, 0.5):
        exact = sum(weights[int(cached * n) :]) / sum(weights)
        assert zipf_misses(cached, n, exponent) == pytest.approx(exact, abs=1e-4)
    assert zipf_misses(1, n, exponent) == 0


def test_a_decoding_step_by_hand():
    config = get("deepseek_v32")
    service = Service(config, H800, 320, 2)
    step = service.decode(131_072)
    weights = 672e9
    assert step.batch == pytest.approx((320 * 80e9 * 0.9 - weights) / (48_068 * 131_072), rel=1e-3)
    cache = 61 * (656 * 2048 + 132 * 131_072)
    assert step.memory_seconds == pytest.approx((weights + step.batch * cache) / (320 * 3.35e12), rel=1e-3)
    assert step.compute_seconds == pytest.approx(step.batch * compute_seconds(decode_flops(config, 131_071), H800) / 320)
    assert service.decode_dollars(131_072) == pytest.approx(1e6 * step.seconds * 320 / step.batch * 2 / 3600)


def test_a_small_batch_reads_few_experts():
    service = Service(get("deepseek_v32"), H800, 10, 2)
    one = service.decode(2**19)
    assert one.batch == 1
    # Active weights and the input embedding; the index keys of 512K tokens and the latents of 2048.
    assert one.memory_seconds * 10 * 3.35e12 == pytest.approx(38.4e9 + 61 * (132 * 2**19 + 656 * 2048), rel=5e-3)


def test_weights_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="not one sequence"):
        Service(get("deepseek_v32"), H800, 8, 2).decode(1024)


def test_dense_and_sparse_cost_alike_where_all_is_chosen_but_for_the_indexer():
    sparse = get("deepseek_v32")
    dense = override(sparse, {"model.attention.sparse": None})
    short, long = ([Service(config, H800, 320, 2).prefill_dollars(length) for config in (dense, sparse)] for length in (1024, 131_072))
    assert short[0] < short[1] < 1.1 * short[0]
    assert long[1] < long[0] / 3
