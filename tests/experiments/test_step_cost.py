"""The cost of a step is measured with Engram too: the random batch has rows, each from the table of its head."""

import numpy as np
import pytest

from mhc_jax.config import override
from mhc_jax.engram_config import EngramConfig
from mhc_jax.engram_layout import table_primes, table_rows
from mhc_jax.experiments.step_cost import measure, random_batch
from tests.small import BASE

ENGRAM = EngramConfig(layers=(0, 2), table_sizes=(11, 31), heads=2, head_dim=4)


def test_rows_lie_in_the_tables_of_their_heads():
    config = override(BASE, {"model.engram": ENGRAM})
    batch = random_batch(config)
    rows = batch["engram_rows"]
    assert rows.dtype == np.int32 and rows.shape == (*batch["tokens"].shape, 2, 4)
    for layer, primes in enumerate(table_primes(ENGRAM).reshape(2, 4)):
        starts = [sum(primes[:head]) for head in range(4)]
        for head, (start, size) in enumerate(zip(starts, primes)):
            # 128 tokens of at most 43 rows: a head that reads another's table, or a part of its own, shows.
            assert start <= rows[:, :, layer, head].min() and rows[:, :, layer, head].max() < start + size
            assert len(np.unique(rows[:, :, layer, head])) > 0.8 * size
    assert "engram_rows" not in random_batch(BASE)


@pytest.mark.slow
def test_a_step_with_memory_is_measured():
    config = override(BASE, {"model.engram": ENGRAM, "model.num_layers": 3})
    (cost,) = measure(config, ["residual"], 2)
    (without,) = measure(override(config, {"model.engram": None}), ["residual"], 1)
    of_tables = sum(table_rows(ENGRAM)) * ENGRAM.head_dim
    # per layer: one key and the value, two gains, four taps and their gain
    of_layers = 2 * (ENGRAM.width * 2 * BASE.model.dim + 7 * BASE.model.dim)
    assert cost.parameters - without.parameters == of_tables + of_layers
    assert len(cost.seconds) == 2 and cost.ratios == pytest.approx((1.0, 1.0))
