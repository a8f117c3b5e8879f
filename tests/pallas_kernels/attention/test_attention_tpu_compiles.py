"""The TPU kernels compile for real chips: `compile_cases` says which case for which chip in which suite."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from compile_cases import CHIPS, check_compiles, matrix
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from pallas_kernels.attention import dense_attention
from pallas_kernels.attention.cases import FIRST, cases
from pallas_kernels.attention.choose import FAMILY
from pallas_kernels.choose import Kernels
from pallas_kernels.static_cost import compile_for

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not here")


def first(case):
    return case.name.startswith(f"s{FIRST}_")


@pytest.mark.parametrize(("case", "chip"), matrix(cases(), first, lambda case: case.direction == "forward"))
def test_the_case_compiles(case, chip):
    check_compiles(case, chip)


@pytest.mark.parametrize(
    ("chip", "dtype"),
    [
        *(pytest.param(chip, jnp.bfloat16, marks=pytest.mark.slow) for chip in CHIPS),
        *(pytest.param(chip, jnp.float32, marks=pytest.mark.slow if chip == CHIPS[-1] else pytest.mark.matrix) for chip in CHIPS),
    ],
)
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


@pytest.mark.matrix
def test_float32_gradients_of_all_heads_do_not_exist_at_once():
    """128 heads of 32768 tokens, one chip. All at once they take 12 GiB, with what it takes to add those of stretches of queries."""

    def array(*shape, kind=jnp.bfloat16):
        return jax.ShapeDtypeStruct((1, *shape), kind)

    q, first = array(128, 32768, 128), array(32768, kind=jnp.int32)
    args = (q, array(128, 32768, 64), q, array(32768, 64), q, first, q, array(128, 32768, kind=jnp.float32), q)
    backward = Kernels(FAMILY, "tpu", False).dense_attention_backward
    compiled = compile_for("tpu7x:2x2x1", lambda *args: backward(*args, 0.1, 512), args)
    assert compiled.memory_analysis().temp_size_in_bytes < 1.5 * 2**30
