"""The TPU kernels compile for real chips: `compile_cases` says which case for which chip in which suite.

Also on a mesh of four chips, where each runs the kernel on its own tokens, and inside the model's layers.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compile_cases import CHIPS, FIRST_CHIP, check_compiles, matrix
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from pallas_kernels.mhc import Mapping, Weights, mhc_post_pre
from pallas_kernels.mhc.cases import FIRST, cases
from pallas_kernels.static_cost import compile_for


def first(case):
    return case.name.startswith(f"t{FIRST[0]}_n4") and case.name.endswith((f"c{FIRST[1]}", "n4"))


@pytest.mark.parametrize(("case", "chip"), matrix(cases(), first))
def test_the_case_compiles(case, chip):
    check_compiles(case, chip)


def seam(mesh, tokens: int, width: int):
    """A seam and its gradient as a user writes them, tokens split over the mesh's axis `x`."""
    mapping = Mapping(4)

    def array(shape, dtype, *split):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*split)))

    x, y = array((tokens, 4 * width), jnp.bfloat16, "x"), array((tokens, width), jnp.bfloat16, "x")
    h = array((24, tokens), jnp.float32, None, "x")
    weights = Weights(array((24, 4 * width), jnp.float32), array((3,), jnp.float32), array((24,), jnp.float32))
    split, rows, whole = PartitionSpec("x"), PartitionSpec(None, "x"), PartitionSpec()

    def per_shard(x, y, h, weights):
        return mhc_post_pre(x, y, h, weights, mapping)

    def loss(x, y, h, weights):
        in_specs, out_specs = (split, split, rows, whole), (split, split, rows)
        outs = jax.shard_map(per_shard, in_specs=in_specs, out_specs=out_specs, check_vma=False)(x, y, h, weights)
        return sum(jnp.sum(out.astype(jnp.float32)) for out in outs)

    return jax.grad(loss, argnums=(0, 1, 2, 3)), (x, y, h, weights)


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_what_the_platform_has_is_chosen_and_compiles_on_four_chips(chip):
    mesh = AbstractMesh((4,), ("x",))
    fn, args = seam(mesh, 2048, 512)
    text = compile_for(chip, fn, args).as_text() or ""
    assert text.count("tpu_custom_call") >= 3  # the seam, Sinkhorn's way back, the seam's gradients


@pytest.mark.slow
def test_the_model_trains_through_the_kernels_inside_its_layers():
    """A bfloat16 mHC model's gradients, for four chips that share the batch: the loops over layers call the seam and its backward."""
    from small import make_batch, small

    from mhc_jax.nn.decoder import Decoder, batch_loss, initial_router_bias

    config = small(dim=128, dtype="bfloat16", num_layers=10, remat="streams")
    model = jax.eval_shape(lambda: Decoder(config, jax.random.key(0)))
    mesh = AbstractMesh((2, 2, 1, 1, 1), ("data", "fsdp", "expert", "context", "tensor"))
    split = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=split), make_batch(config, sequences=4, length=128))
    bias = jax.eval_shape(lambda: initial_router_bias(config))
    compiled = compile_for(FIRST_CHIP, jax.grad(lambda m, batch, bias: batch_loss(m, batch, bias)[0]), (model, batch, bias))
    text = compiled.as_text() or ""
    assert text.count("tpu_custom_call") >= 6
    assert np.isfinite(compiled.memory_analysis().temp_size_in_bytes)
