"""The TPU kernels compile for real chips: `compile_cases` says which case for which chip in which suite."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from compile_cases import CHIPS, check_compiles, matrix
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from pallas_kernels.attention import dense_attention
from pallas_kernels.attention.cases import FIRST, cases
from pallas_kernels.static_cost import compile_for

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not here")


def first(case):
    return case.name.startswith(f"s{FIRST}_")


@pytest.mark.parametrize(("case", "chip"), matrix(cases(), first, lambda case: case.direction == "forward"))
def test_the_case_compiles(case, chip):
    check_compiles(case, chip)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("chip", CHIPS)
def test_what_the_platform_has_is_chosen_and_compiles_on_four_chips(chip, dtype):
    """Attention and its gradient as a user writes them, a sequence of ragged length on every chip."""
    split = PartitionSpec("x")
    sharding = NamedSharding(AbstractMesh((4,), ("x",)), split)

    def array(*shape, kind=dtype):
        return jax.ShapeDtypeStruct((4, *shape), kind, sharding=sharding)

    q, r, first = array(2, 1500, 128), array(2, 1500, 64), array(1500, kind=jnp.int32)

    def loss(*args):
        attend = jax.shard_map(lambda *args: dense_attention(*args, scale=0.1).out, in_specs=(split,) * 6, out_specs=split, check_vma=False)
        return jnp.sum(attend(*args).astype(jnp.float32))

    args = (q, r, q, array(1500, 64), q, first)
    text = compile_for(chip, jax.grad(loss, argnums=range(5)), args).as_text() or ""
    assert text.count("tpu_custom_call") >= 2  # the attention and its gradients
