"""Counted cost of attention, held against numbers worked out by hand and against sums over single tokens."""

import pytest

from mhc_jax.configs.laptop import laptop
from mhc_jax.configs.sparse import deepseek_v32
from mhc_jax.errors import UserError
from mhc_jax.experiments.published_costs import DECODE, PREFILL, K, priced, rate
from mhc_jax.plan.attention import Part, crossing, decode_counts, prefill_counts

CONFIG = deepseek_v32()


@pytest.mark.parametrize(("length", "dense", "sparse", "indexer"), [(32 * K, 44.0, 18.7, 8.8), (128 * K, 703.7, 74.8, 140.7)])
def test_a_whole_sequence_takes_what_it_takes_by_hand(length, dense, sparse, indexer):
    counts = prefill_counts(CONFIG)
    pairs = length * length // 2  # to one part in the length
    assert counts.dense.prefill_flops(length) == pytest.approx(2 * 128 * (128 + 64 + 128) * pairs, rel=1e-4)
    assert counts.dense.prefill_flops(length) / 1e12 == pytest.approx(dense, abs=0.05)
    # By hand every query gathers 2048 rows; counted, the first 2047 see fewer.
    assert counts.sparse.flops_per_key * 2048 * length / 1e12 == pytest.approx(sparse, abs=0.05)
    assert counts.sparse.prefill_flops(length) == counts.sparse.flops_per_key * (2048 * length - 2048 * 2047 // 2)
    scores = counts.indexer.prefill_flops(length) - counts.indexer.flops_fixed * length
    assert scores / 1e12 == pytest.approx(indexer, abs=0.05)


def test_rows_gathered_at_32k():
    counts = prefill_counts(CONFIG)
    assert counts.sparse.bytes_per_key == 1152
    assert counts.sparse.prefill_keys(32 * K) == pytest.approx(67e6, rel=0.035)


def test_a_decoded_token_at_128k_in_61_layers():
    counts = decode_counts(CONFIG)
    last, layers = 128 * K - 1, CONFIG.model.num_layers
    assert layers * counts.dense.flops(last) / 1e9 == pytest.approx(2227, abs=1)
    assert layers * counts.sparse.flops(last) / 1e9 == pytest.approx(34.8, abs=0.1)
    assert counts.indexer_leads() == pytest.approx(34 * K, rel=1e-3)  # 2 * 128 * 1088 * 2048 / (2 * 64 * 128) keys
    assert counts.dense.bytes(last) == 128 * K * 1152 and counts.sparse.bytes(last) == 2048 * 1152


def test_the_indexers_projections_are_its_parameters_without_the_norm():
    assert prefill_counts(CONFIG).indexer.flops_fixed == 2 * (1536 * 8192 + 7168 * 128 + 7168 * 64)


@pytest.mark.parametrize("most", [None, 1, 7, 100])
def test_a_sequence_is_the_sum_of_its_tokens(most):
    part = Part(flops_per_key=3, bytes_per_key=2, most_keys=most, flops_fixed=11)
    for length in (1, 7, 50):
        assert part.prefill_flops(length) == sum(part.flops(position) for position in range(length))


def test_break_even_and_knee_by_hand():
    prefill, decode = prefill_counts(CONFIG), decode_counts(CONFIG)
    fixed, chosen = prefill.indexer.flops_fixed, 278_528 * 2048
    assert prefill.break_even() == pytest.approx((chosen + fixed) / (81_920 - 16_384) - 1, abs=0.01)
    assert decode.break_even() == pytest.approx((chosen + fixed) / (278_528 - 16_384) - 1, abs=0.01)
    assert prefill.masked_until() == pytest.approx(chosen / 81_920 - 1, abs=0.01)


def test_pages_share_their_keys_among_64_queries():
    counts = prefill_counts(CONFIG)
    assert counts.page.flops(10_000) == counts.sparse.flops(10_000)
    assert 64 * counts.page.bytes(10_000) == counts.sparse.bytes(10_000)


def test_a_config_without_sparse_attention_is_refused():
    with pytest.raises(UserError, match=r"'laptop' has no model\.attention\.sparse"):
        prefill_counts(laptop())


def test_no_crossing_is_an_error():
    with pytest.raises(ValueError, match="no crossing"):
        crossing(lambda t: t, lambda t: t - 1)


def test_published_curves():
    assert PREFILL.ratio(128 * K) == pytest.approx(3.6, abs=0.05) and DECODE.ratio(128 * K) == pytest.approx(8.65, abs=0.05)
    assert PREFILL.break_even() == pytest.approx(10.4 * K, rel=0.01) and DECODE.break_even() == pytest.approx(4.8 * K, rel=0.01)
    assert PREFILL.sparse(0) > PREFILL.dense(0) and DECODE.sparse(0) > DECODE.dense(0)


def test_the_price_of_a_flop_reproduces_the_line_it_is_taken_from():
    counts, layers = prefill_counts(CONFIG), CONFIG.model.num_layers
    dollars = priced(counts, PREFILL, layers, counts.dense_flops)
    for position in (0, 10_000, 128 * K):
        assert dollars(position) == pytest.approx(PREFILL.dense(position), rel=1e-4)
    # 594 TFLOP/s for 2 dollars an hour: what the H800 does in dense flash attention.
    assert rate(PREFILL.dense.slope(), counts.dense.flops_per_key, layers) == pytest.approx(5.94e14, rel=1e-2)
    # Two lines that have nothing but the config in common with the dashed one.
    inferred = priced(counts, PREFILL, layers, counts.least_flops)
    assert inferred(128 * K) == pytest.approx(PREFILL.sparse(128 * K), rel=0.15)
