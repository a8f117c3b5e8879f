"""The study of economics: its report, and the figures that its sentences name."""

import pytest

from mhc_jax.configs import get
from mhc_jax.experiments import economics
from mhc_jax.experiments.economics_figures import GROUPS, money
from mhc_jax.experiments.economics_training import stream_shares, variants
from mhc_jax.experiments.published_costs import K
from mhc_jax.experiments.studies import STUDIES
from mhc_jax.plan.flops import PARTS, decode_flops, training_flops
from mhc_jax.plan.v4 import FLASH, PRO, V4_WEIGHTS, V32_WEIGHTS


def test_the_report(tmp_path):
    said: list[str] = []
    STUDIES[economics.NAME](tmp_path, "mhc-jax study economics", said.append)
    report = (tmp_path / "report.md").read_text()
    assert "| DeepSeek-V3, pre-training | 2.674 | 2.664 | M H800 hours | +0.4 % | yes |" in report
    assert "| NO |" not in report
    assert "| total | 250.46 | 465.37 | 1,202.23 | 309.97 | 348.02 | 399.68 |" in report
    for name in ("training", "shares", "ideas", "engram_memory", "serving", "v4"):
        assert (tmp_path / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert said == [f"report: {tmp_path / 'report.html'}"]


def test_every_part_is_drawn_once():
    assert sorted(part for parts, _ in GROUPS.values() for part in parts) == sorted(PARTS)


@pytest.mark.parametrize(("dollars", "text"), [(300, "$300"), (5e3, "$5K"), (1e6, "$1M"), (2e9, "$2B")])
def test_money(dollars, text):
    assert money(dollars) == text


def test_shares_that_the_text_names():
    """What the table of savings, the docstring of `moe_1t` and the sentences on V4 say in words."""
    base, own = get("v3_671b"), variants()

    def more(config, length):
        return 100 * (training_flops(config, length).total / training_flops(base, length).total - 1)

    assert round(more(own["mHC"], 4 * K), 1) == 0.3
    assert round(more(own["Engram"], 4 * K), 1) == 0.4
    assert [round(more(own["sparse attention"], length)) for length in (4 * K, 128 * K)] == [22, -67]
    assert [round(more(get("moe_1t"), length)) for length in (4 * K, 32 * K, 128 * K)] == [24, -25, -67]
    v32 = get("deepseek_v32")
    for length, pro, flash in ((4 * K, 80, 21), (1024 * K, 27, 10)):
        reference = decode_flops(v32, length - 1).weighted(V32_WEIGHTS)
        assert [round(100 * model.decode_flops(length).weighted(V4_WEIGHTS) / reference) for model in (PRO, FLASH)] == [pro, flash]
    alike = PRO.decode_flops(1024 * K).total / decode_flops(v32, 1024 * K - 1).total
    assert round(100 * alike, 1) == 26.2


def test_streams_cost_a_share_in_proportion_to_their_traffic():
    shares = stream_shares(get("v3_671b"))
    assert shares["separate, 34 C"] / shares["one seam, 10 C"] == pytest.approx(3.4)
    # 122 sublayers of 10 x 7168 numbers of 2 bytes at 3.35 TB/s, over 83.5 GFLOP at 385 TFLOP/s.
    assert shares["one seam, 10 C"] == pytest.approx(122 * 10 * 7168 * 2 / 3.35e12 / (83.49e9 / 385.1e12), rel=1e-3)
