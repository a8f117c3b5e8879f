"""The formula of FLOPs, against counted parameters, sums over single tokens, the caches of decoding, and published numbers."""

import jax
import pytest
from small import small

from mhc_jax.config import override
from mhc_jax.configs import CONFIGS, get
from mhc_jax.nn.count import count_parameters
from mhc_jax.nn.decode import Cache
from mhc_jax.plan.flops import (
    KINDS,
    cache_bytes,
    decode_flops,
    forward_flops,
    prefill_flops,
    table,
    training_flops,
)
from mhc_jax.plan.v4 import FLASH, PRO

V3, V32 = get("v3_671b"), get("deepseek_v32")


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_matrices_take_two_flops_a_parameter_that_is_active(name):
    config = get(name)
    flops = forward_flops(config, config.data.seq_len)
    c = config.model.connections
    vectors = flops.parts["attention scores and values"] + flops.parts["indexer scores"] + flops.parts["stream mixing"]
    if config.model.residual == "mhc":
        vectors += 2 * config.model.num_layers * 4 * c.streams**2 * c.sinkhorn_steps
    if config.model.engram is not None:
        n = c.streams
        vectors += len(config.model.engram.layers) * (12 if config.model.engram.conv else 4) * n * config.model.dim
    # What is left are matrices; norms, biases and gates, which are active too, are fewer than a thousandth (a fiftieth at laptop's size).
    least = 0.98 if count_parameters(config.model).total < 1e9 else 0.999
    assert least < (flops.total - vectors) / (2 * count_parameters(config.model).active) <= 1


@pytest.mark.parametrize("residual", ["residual", "static_hc", "hc", "identity_hc", "mhc", "mhc_lite", "kromhc"])
def test_mappings_by_hand(residual):
    """n = 4 streams of C = 16 at 6 sites, hence 2 n C = 128 FLOPs a column of coefficients."""
    model = small(residual=residual)
    config = override(get("laptop"), {"model": model})
    columns = {"residual": 0, "static_hc": 0, "hc": 6, "identity_hc": 8, "mhc": 24, "mhc_lite": 32, "kromhc": 12}[residual]
    res = {"mhc": 4 * 16 * 20, "mhc_lite": 2 * 16 * 24, "kromhc": 2 * (2 * 4 * 2) + 16}.get(residual, 0)
    parts = forward_flops(config, 8).parts
    assert parts["stream mappings"] == 6 * (128 * columns + res)
    mixed = {"residual": 0, "identity_hc": 8}.get(residual, 24)
    assert parts["stream mixing"] == 6 * 2 * 16 * mixed + (64 if mixed else 0)


def test_a_sequence_is_the_mean_of_its_tokens():
    for length in (1, 3, 50):
        tokens = [prefill_flops(V3, position).total for position in range(length)]
        assert forward_flops(V3, length).total == pytest.approx(sum(tokens) / length, rel=1e-12)
    # Beyond top_k the library runs all of a sequence in the latent space; a service may mask the early part, and is never dearer.
    for length in (16_384, 65_536):
        steps = range(0, length, 64)
        mean = sum(prefill_flops(V32, position).total for position in steps) / len(steps)
        assert mean <= forward_flops(V32, length).total <= 1.12 * mean


def test_training_is_three_times_forward_but_for_the_indexer():
    forward, training = forward_flops(V32, 8192).parts, training_flops(V32, 8192).parts
    layers, per_key = 61, 2 * 64 * 128
    chosen = (2048 * 2049 / 2 + (8192 - 2048) * 2048) / 8192
    assert training["indexer scores"] == pytest.approx(layers * per_key * (8193 / 2 + 2 * chosen))
    assert training["indexer projections"] == 2 * forward["indexer projections"]
    for part in set(KINDS) - {"indexer scores", "indexer projections"}:
        assert training[part] == 3 * forward[part]


def test_the_warm_up_runs_all_but_the_indexer_forward_and_densely():
    warmup = override(V32, {"model.attention.sparse.stage": "warmup"})
    dense, training = forward_flops(V3, 8192).parts, training_flops(warmup, 8192).parts
    assert training["indexer scores"] == pytest.approx(61 * 2 * 64 * 128 * 3 * 8193 / 2)
    for part in set(KINDS) - {"indexer scores", "indexer projections"}:
        assert training[part] == dense[part]


def test_decoding_sees_what_is_cached():
    """Slopes over position are the FLOPs of a key: 2 x 128 heads x (2 x 512 + 64) dense; 2 x 64 x 128 sparse, in 61 layers."""
    for config, per_key in ((V3, 278_528), (V32, 16_384)):
        assert decode_flops(config, 10_000).total - decode_flops(config, 9_999).total == 61 * per_key
    assert decode_flops(V32, 131_071).parts["attention scores and values"] == 61 * 278_528 * 2048


@pytest.mark.parametrize("name", ["laptop", "dsa_laptop", "deepseek_v32", "engram_27b"])
def test_cache_bytes_are_those_of_the_arrays_of_decoding(name):
    config = get(name)
    length = 512
    shapes = jax.eval_shape(lambda: Cache.empty(config.model, 1, length, "bfloat16"))
    arrays = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes[1:]))
    assert cache_bytes(config, length) == arrays


def test_v4s_cache_is_bounded_by_its_parts():
    """At one token there is nothing compressed but the share of an entry, and one window row in every layer."""
    assert FLASH.cache_bytes(1) == pytest.approx(43 * 583 + 21 * 651 / 4 + 20 * 583 / 128)
    assert PRO.cache_bytes(2**20) / 2**20 == pytest.approx(5028, abs=0.1)


def test_v4_flops_grow_by_the_indexer_and_by_the_heavily_compressed_layers():
    first, second = PRO.decode_flops(2**20).parts, PRO.decode_flops(2**20 + 128).parts
    assert second["indexer scores"] - first["indexer scores"] == 30 * 2 * 64 * 128 * 128 // 4
    assert second["attention scores and values"] - first["attention scores and values"] == 31 * 2 * 128 * 1024


def test_a_table_names_the_parts_that_are_there():
    header, rows = table({"forward": forward_flops(V3, 4096), "training": training_flops(V3, 4096)})
    assert header == ["part", "forward", "training"]
    assert rows[-1] == ["total", "83.49", "250.46"]
    assert "Engram" not in {row[0] for row in rows}
