"""The TPU kernels compile for real chips: `compile_cases` says which case for which chip in which suite."""

import jax
import jax.numpy as jnp
import pytest
from compile_cases import CHIPS, check_compiles, matrix
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from pallas_kernels.engram_gate import gate_add
from pallas_kernels.engram_gate.cases import FIRST, N, cases
from pallas_kernels.static_cost import compile_for

SPLIT, WHOLE = PartitionSpec("x"), PartitionSpec()


def first(case):
    return case.name == f"t{FIRST[0]}_n{N}_c{FIRST[1]}"


@pytest.mark.parametrize(("case", "chip"), matrix(cases(), first, lambda case: case.kernel == "gate_add"))
def test_the_case_compiles(case, chip):
    check_compiles(case, chip)


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_what_the_platform_has_is_chosen_and_compiles_on_four_chips(chip):
    """A gate and its gradient as a user writes them, tokens split over the mesh; 520 tokens on each, which tiles do not divide."""
    tokens, width = 2080, 256

    def array(*shape, dtype=jnp.bfloat16, split=SPLIT):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(AbstractMesh((4,), ("x",)), split))

    def loss(streams, keys_value, gain):
        specs = (SPLIT, SPLIT, WHOLE)
        call = jax.shard_map(lambda *args: gate_add(*args, norm_eps=1e-6)[0], in_specs=specs, out_specs=SPLIT, check_vma=False)
        return jnp.sum(call(streams, keys_value, gain).astype(jnp.float32))

    args = (array(tokens, N * width), array(tokens, (N + 1) * width), array(N, width, dtype=jnp.float32, split=WHOLE))
    text = compile_for(chip, jax.grad(loss, argnums=(0, 1, 2)), args).as_text() or ""
    assert text.count("tpu_custom_call") >= 2  # the gate and its gradients
