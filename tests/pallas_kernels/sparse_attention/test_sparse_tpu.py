"""TPU kernels of sparse attention, interpreted on the CPU against float64, and compiled for chips that are not there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems_sparse import errors, oracle, problem, run

from pallas_kernels.sparse_attention.tpu import scatter
from pallas_kernels.sparse_attention.tpu.rows import TILE
from pallas_kernels.tpu import tiles
from pallas_kernels.visible import PAGE

BF16 = jnp.bfloat16
SMALL = {"heads": 16, "rank": 128, "rope": 64, "nope": 32, "value": 32, "dtype": BF16, "pages": True}
PAGES = {
    "two documents": {"length": 2 * PAGE, "chosen": 2, "batch": 1},
    "an odd number of pages, ragged queries": {"length": 2 * PAGE + 7, "chosen": 3, "batch": 2, "options": {"query_chunk": PAGE}},
    "keys beyond the queries": {"length": PAGE, "keys": 5 * PAGE + 5, "chosen": 2, "batch": 1},
}


@pytest.mark.parametrize("name", [name if "odd" in name else pytest.param(name, marks=pytest.mark.slow) for name in PAGES])
def test_pages_equal_float64_as_far_as_xla_does(name):
    shape = SMALL | PAGES[name]
    options = shape.pop("options", {})
    p = problem(**shape)
    wanted = oracle(p)
    got, xla = (
        errors(run(p, **how, **options), wanted) for how in ({"implementation": "tpu", "interpret": True}, {"implementation": "xla"})
    )
    assert all(got[key] < 1.5 * xla[key] + 1e-6 for key in wanted), (got, xla)
    assert max(xla.values()) < 2e-2


TOKENS = {
    "two sequences, some queries without keys": {"length": 6, "keys": 400, "chosen": 300, "batch": 2},
    "an odd number of queries, decoding": {"length": 1, "keys": 300, "chosen": 40, "batch": 1, "empty": False},
    "two chunks": {"length": 7, "keys": 300, "chosen": 270, "batch": 1, "options": {"query_chunk": 4}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENS)
def test_tokens_equal_float64_as_far_as_xla_does(name):
    check_tokens(TOKENS[name])


@pytest.mark.parametrize(
    "shape",
    [
        {"length": 3, "keys": 300, "chosen": 200, "batch": 1},
        pytest.param({"length": 5, "keys": 700, "chosen": 600, "batch": 2, "documents": 3}, marks=pytest.mark.slow),
    ],
)
def test_gradients_of_tokens_that_lie_in_many_ranges(shape, monkeypatch):
    """64 keys a range, as if VMEM were that small: tiles of a query reach over several of them, and some ranges have no keys at all."""
    monkeypatch.setattr(scatter, "BESIDE", tiles.vmem_limit(tiles.chip()) - 64 * 2 * 512)
    assert scatter.sum_of(jnp.zeros((1, shape["keys"], 192))).shape[1] > 3
    check_tokens(shape)


@pytest.mark.parametrize("cores", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_sums_are_exact_and_have_one_order(cores, monkeypatch):
    """Small integers against numpy; numbers of any size are the same bits whatever the ranges, as each key's rows are added in order."""
    monkeypatch.setattr(tiles, "chip", lambda: tiles.Chip(generation=5, vmem=64 * tiles.MIB, mxu=128, cores=cores))
    queries, heads, rank, keys, chosen = 4, 2, 128, 500, 2 * TILE
    rng = np.random.default_rng(0)
    count = np.array([chosen, 0, 300, 1], np.int32)
    index = np.zeros((queries, chosen), np.int32)
    for i in range(queries):
        index[i, : count[i]] = np.sort(rng.choice(2 * keys, count[i], replace=False))
    integers = [rng.integers(-3, 4, shape) for shape in ((queries, 2 * heads, chosen), (queries, heads, 2 * rank), (queries, heads, rank))]
    wanted = np.zeros((2 * keys, 2 * rank))
    for i, (factors, q, d_o) in enumerate(zip(*integers)):
        right = np.concatenate([q, np.pad(d_o, ((0, 0), (0, rank)))])
        np.add.at(wanted, index[i, : count[i]], (factors.T @ right)[: count[i]])

    def summed(arrays):
        latent = jax.ShapeDtypeStruct((2, keys, 2 * rank), BF16)
        total = scatter.sum_of(latent)
        add = jax.jit(lambda *given: scatter.gradient_of(scatter.scatter(total, *given, 2 * keys, interpret=True), latent))
        return total.shape[1], np.asarray(add(index, count, *(jnp.asarray(x, BF16) for x in arrays))).reshape(wanted.shape)

    def in_ranges(arrays):
        with monkeypatch.context() as patch:
            patch.setattr(scatter, "BESIDE", tiles.vmem_limit(tiles.chip()) - 256 * 2 * 512)
            return summed(arrays)

    number, found = in_ranges(integers)
    assert number == 4
    np.testing.assert_array_equal(found, wanted)
    fractions = [x + rng.random(x.shape) for x in integers]
    np.testing.assert_array_equal(in_ranges(fractions)[1], summed(fractions)[1])


def check_tokens(shape):
    shape = SMALL | {"pages": False, "rank": 256} | shape
    options = shape.pop("options", {})
    p = problem(**shape)
    wanted = oracle(p)
    got, xla = (
        errors(run(p, **how, **options), wanted) for how in ({"implementation": "tpu", "interpret": True}, {"implementation": "xla"})
    )
    assert all(got[key] < 1.5 * xla[key] + 1e-6 for key in wanted), (got, xla)
    assert max(xla.values()) < 2e-2
