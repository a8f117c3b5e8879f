"""Eight devices decode what one does, in float64, and each remembers its own sequences alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from ngrams_made import made
from small import make, relative, shaken, small, widened

from mhc_jax.config import MeshConfig
from mhc_jax.engram_config import EngramConfig
from mhc_jax.nn.decode import DECODING, Cache, Ngrams, decode, network_of
from mhc_jax.nn.module import specs
from mhc_jax.nn.ngram_hash import hash_numbers
from mhc_jax.parallel.mesh import make_mesh, shardings
from mhc_jax.sparse_config import SparseConfig

SIZES = {"num_layers": 2, "attention__num_heads": 8, "moe__num_experts": 8, "moe__expert_dim": 8}
SPARSE = SparseConfig(index_heads=8, index_dim=8, top_k=6, query_chunk=8)
CASES = {
    "engram, sparse": {"engram": EngramConfig(layers=(1,), table_sizes=(11, 13), heads=2, head_dim=4), "attention__sparse": SPARSE},
    "plain": {"residual": "residual", "attention__q_rank": None},
    "qk_norm": {"attention__qk_norm": True},
}
MESHES = {"fsdp 2 expert 2 tensor 2": MeshConfig(fsdp=2, expert=2, tensor=2), "data 4 context 2": MeshConfig(data=4, context=2)}
CALLS = (2, 2, 2)


PAIRS = [(case, mesh) for case in CASES for mesh in MESHES]


@pytest.mark.parametrize(("case", "mesh"), [pytest.param(*pair, marks=pytest.mark.slow if i else ()) for i, pair in enumerate(PAIRS)])
def test_a_mesh_decodes_as_one_device_does(float64, case, mesh):
    config = small(**SIZES, **{"attention__q_rank": 12} | CASES[case])
    rng, batch, capacity = np.random.default_rng(0), 4, 16
    tokens = rng.integers(0, config.vocab_size, (batch, sum(CALLS)))
    model, bias = widened(shaken(make(config))), jnp.asarray(0.1 * rng.standard_normal((1, config.moe.num_experts)))
    ngrams = None
    if config.engram is not None:
        artifact = made(config.engram, config.vocab_size)
        tables = tuple(jnp.asarray(rng.standard_normal((rows, config.engram.head_dim))) for rows in artifact.rows)
        numbers = hash_numbers(artifact.multipliers, artifact.primes, artifact.offsets)
        ngrams = Ngrams(tables, numbers, jnp.asarray(artifact.lookup), jnp.asarray(artifact.pad))

    def run(network, cache):
        step, found, at = jax.jit(decode, donate_argnums=3), [], 0
        for size in CALLS:
            count = np.array([1, size, size, size])  # a sequence that is shorter than others
            logits, cache = step(network, tokens[:, at : at + size], count, cache)
            found.append(np.asarray(logits))
            at += size
        return found, cache

    wanted, kept = run(network_of(model, bias, ngrams), Cache.empty(config, batch, capacity, jnp.float64))
    on = make_mesh(MESHES[mesh])
    with jax.set_mesh(on):
        network = network_of(jax.device_put(model, shardings(on, DECODING, specs(model), model)), bias, ngrams)
        empty = Cache.empty(config, batch, capacity, jnp.float64)
        found, split = run(network, jax.device_put(empty, NamedSharding(on, DECODING.spec("batch"))))
    for a, b in zip((*found, *jax.tree.leaves(split)), (*wanted, *jax.tree.leaves(kept)), strict=True):
        assert relative(a, b) < 1e-12
    for remembered in jax.tree.leaves(split):
        assert {shard.data.shape[0] for shard in remembered.addressable_shards} == {1}
    experts = network.layers[-1].ffn.inner
    assert experts.addressable_shards[0].data.size * (8 if "tensor" in mesh else 1) == experts.size
