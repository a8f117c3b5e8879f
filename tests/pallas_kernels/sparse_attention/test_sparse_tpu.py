"""TPU kernels of sparse attention, interpreted on the CPU against float64, and compiled for chips that are not there."""

import jax.numpy as jnp
import pytest
from problems_sparse import errors, oracle, problem, run

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
}


@pytest.mark.parametrize("name", [name if "odd" in name else pytest.param(name, marks=pytest.mark.slow) for name in TOKENS])
def test_tokens_equal_float64_as_far_as_xla_does(name):
    """Forward only: the backward pass of single tokens is XLA's."""
    p = problem(**SMALL | {"pages": False, "rank": 256} | TOKENS[name])
    wanted = oracle(p)
    got, xla = (errors(run(p, **how), wanted) for how in ({"implementation": "tpu", "interpret": True}, {"implementation": "xla"}))
    assert all(got[key] < 1.5 * xla[key] + 1e-6 for key in wanted), (got, xla)
