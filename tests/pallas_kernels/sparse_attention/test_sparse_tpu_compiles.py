"""The TPU kernels compile for real chips, and what a whole pass takes beside its arguments at the published shape stays bounded."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from compile_cases import check_compiles, matrix

from pallas_kernels.choose import Kernels
from pallas_kernels.sparse_attention import sparse_mla
from pallas_kernels.sparse_attention.cases import CHOSEN, HEADS, NOPE, RANK, ROPE, VALUE, cases
from pallas_kernels.sparse_attention.choose import FAMILY
from pallas_kernels.sparse_attention.chunks import attend_backward, attend_forward, plan_of
from pallas_kernels.sparse_attention.spec import Keys, Weights
from pallas_kernels.static_cost import compile_for
from pallas_kernels.visible import PAGE, Selected, Span


def first(case):
    return "s512_t32768" in case.name


@pytest.mark.parametrize(("case", "chip"), matrix(cases(), first, lambda case: case.direction == "forward" and "pages" in case.name))
def test_the_case_compiles(case, chip):
    check_compiles(case, chip)


@pytest.mark.parametrize("pages", [True, False])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("implementation", [pytest.param("tpu", marks=pytest.mark.slow), pytest.param("xla", marks=pytest.mark.matrix)])
@pytest.mark.parametrize("chip", ["v5p:2x2x1", "v6e:2x2"])
def test_a_pass_over_131072_queries_and_keys_takes_two_gibibytes_at_most(chip, implementation, direction, pages):
    length = 131072

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    blocks, chosen = (length // PAGE, CHOSEN // PAGE) if pages else (length, CHOSEN)
    q_rope, latent = array(1, length, HEADS, ROPE), array(1, length, RANK + ROPE)
    keys = Keys(*(array(*shape, dtype=jnp.int32) for shape in ((1, blocks, chosen), (1, blocks), (1, length), (1, length))))
    weights = Weights(array(RANK, HEADS, NOPE), array(RANK, HEADS, VALUE))
    kernels, backward = Kernels(FAMILY, implementation, False), direction == "backward"
    plan = plan_of(kernels, q_rope, latent, chosen, scale=0.1, pages=pages, query_chunk=512, backward=backward)
    arguments = (array(1, length, HEADS, NOPE), q_rope, weights, latent, keys)
    if backward:
        out = array(1, length, HEADS, VALUE)
        arguments += (out, array(1, length, HEADS, dtype=jnp.float32), out)
    fn = attend_backward if backward else attend_forward
    memory = compile_for(chip, lambda *arguments: fn(plan, *arguments), arguments).memory_analysis()
    two_sums = chip.startswith("v5p") and implementation == "tpu" and backward and not pages  # of latents' gradients, one for each core
    assert memory.temp_size_in_bytes <= (5 << 29 if two_sums else 2 << 30)


@pytest.mark.slow
@pytest.mark.parametrize(("queries", "kernels"), [(1, False), (8, True)])
def test_a_decoded_token_gathers_from_the_cache_as_it_is(queries, kernels):
    """2048 of 8192 keys for each query; the kernels would first copy all of them."""

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((1, *shape), dtype)

    whole = partial(array, dtype=jnp.int32)
    q_nope, q_rope, latent = array(queries, 16, NOPE), array(queries, 16, ROPE), array(8192, RANK + ROPE)
    up = jax.ShapeDtypeStruct((RANK, 16, NOPE), jnp.bfloat16)
    selected, span = Selected(whole(queries, CHOSEN), whole(queries)), Span(whole(queries), whole(queries))
    text = compile_for("v6e:2x2", partial(sparse_mla, scale=0.1), (q_nope, q_rope, up, up, latent, selected, span)).as_text() or ""
    assert ("tpu_custom_call" in text) == kernels
