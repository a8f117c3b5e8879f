"""What every model's parameters promise: names, places, decay, a way to files and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import KINDS, make, small

from mhc_jax.nn.decoder import Decoder
from mhc_jax.nn.module import Spec, from_dict, named_parameters, specs, to_dict


def model(kind: str) -> Decoder:
    return jax.eval_shape(lambda: Decoder(small(residual=kind, connections__collapse="learned", attention__q_rank=6), jax.random.key(0)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_a_spec_with_a_name_for_each_axis(kind):
    shapes, given = dict(named_parameters(model(kind))), dict(named_parameters(specs(model(kind))))
    assert shapes.keys() == given.keys()
    for name, spec in given.items():
        assert isinstance(spec, Spec)
        assert len(spec.axes) == shapes[name].ndim, name
        assert ("layers" in spec.axes) == name.startswith(("dense_layers.", "moe_layers.")), name


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_decay_and_norms_biases_and_gates_never_do(kind):
    for name, spec in named_parameters(specs(model(kind))):
        last = name.split(".")[-1]
        assert spec.decay == (not last.endswith(("norm", "bias", "alpha", "qk_scales"))), name


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_float32(kind):
    assert {p.dtype for _, p in named_parameters(model(kind))} == {jnp.dtype("float32")}


def test_parameters_survive_the_way_through_dictionaries():
    original = make(small(connections__collapse="learned"))
    plain = jax.tree.map(np.asarray, to_dict(original))
    assert set(plain) == {"embedding", "dense_layers", "moe_layers", "head", "final_norm", "unembed"}
    assert isinstance(plain["moe_layers"]["ffn"]["shared"], dict)
    back = from_dict(jax.eval_shape(lambda: original), plain)
    assert str(jax.tree.structure(back)) == str(jax.tree.structure(original))
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(original)))


@pytest.mark.parametrize("kind", ["mhc", "residual"])
def test_a_compiled_construction_equals_an_eager_one(kind):
    """The same leaves, also for modules made under vmap and jit."""
    config = small(residual=kind, num_layers=2)
    eager, compiled = Decoder(config, jax.random.key(0)), make(config, impl="threefry2x32")
    assert str(jax.tree.structure(eager)) == str(jax.tree.structure(compiled))
    for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(compiled)):
        assert np.allclose(a, b, atol=1e-7)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(eager))
