"""The specification against an oracle that shares nothing with it, and its gradients against central differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gates import CONV_EPS, NORM_EPS, document_of, gate
from oracles import engram_gate as oracle

from pallas_kernels.engram_gate import gate_add, gate_conv_add, reference

N, TOKENS, WIDTH = 3, 23, 6
DOCUMENT = document_of(TOKENS)


@pytest.fixture
def args(float64):
    g = gate(N, TOKENS, WIDTH, conv=True)
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float64) if a.dtype != jnp.int32 else a, (g.streams, g.keys_value, g.gain, g.conv))


def numpy_gate(streams, keys_value, gain, conv=None):
    h = streams.reshape(TOKENS, N, WIDTH)
    keys, value = np.split(keys_value.reshape(TOKENS, N + 1, WIDTH), [N], axis=1)
    if conv is None:
        return oracle.add(h, keys, value[:, 0], gain, NORM_EPS)
    return oracle.conv_add(h, keys, value[:, 0], gain, conv.weight, conv.gain, DOCUMENT, NORM_EPS, CONV_EPS)


def function(with_conv: bool):
    if with_conv:
        return lambda *args: reference.gate_conv_add(*args, NORM_EPS, CONV_EPS)
    return lambda streams, keys_value, gain, conv: reference.gate_add(streams, keys_value, gain, NORM_EPS)


@pytest.mark.parametrize("with_conv", [False, True])
def test_values_equal_the_numpy_oracle(args, with_conv):
    out, alpha = function(with_conv)(*args)
    wanted, wanted_alpha = numpy_gate(*jax.tree.map(np.asarray, args if with_conv else args[:3]))
    np.testing.assert_allclose(out, wanted.reshape(TOKENS, -1), rtol=0, atol=1e-13)
    np.testing.assert_allclose(alpha, wanted_alpha.T, rtol=0, atol=1e-14)


@pytest.mark.parametrize("with_conv", [False, True])
def test_gradients_are_the_slopes_of_the_numpy_oracle(args, with_conv):
    """Along a random direction of each argument."""
    rng = np.random.default_rng(1)
    args = args if with_conv else args[:3]
    direction = jax.tree.map(lambda a: rng.standard_normal(a.shape) if a.dtype == jnp.float64 else np.zeros(a.shape, np.int32), args)
    weights = rng.standard_normal((TOKENS, N * WIDTH)), rng.standard_normal((N, TOKENS))

    def loss(*args):
        out, alpha = function(with_conv)(*(args if with_conv else (*args, None)))
        return jnp.sum(out * weights[0]) + jnp.sum(alpha * weights[1])

    def numpy_loss(args):
        out, alpha = numpy_gate(*args)
        return np.sum(out.reshape(TOKENS, -1) * weights[0]) + np.sum(alpha.T * weights[1])

    gradients = jax.grad(loss, argnums=tuple(range(len(args))), allow_int=True)(*args)
    leaves, tree = jax.tree.flatten(args)
    for k, (gradient, along) in enumerate(zip(jax.tree.leaves(gradients), jax.tree.leaves(direction))):
        if leaves[k].dtype == jnp.int32:
            continue

        def moved(step, k=k, along=along):
            return numpy_loss(tree.unflatten([np.asarray(a) + step * along if j == k else np.asarray(a) for j, a in enumerate(leaves)]))

        wanted = oracle.slope(moved)
        assert abs(np.sum(np.asarray(gradient) * along) - wanted) < 1e-6 * max(1.0, abs(wanted))


def test_float64_streams_are_computed_in_float64(args):
    for got, wanted in zip(gate_conv_add(*args, norm_eps=NORM_EPS, conv_eps=CONV_EPS), function(True)(*args)):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-13)
    for got, wanted in zip(gate_add(*args[:3], norm_eps=NORM_EPS), function(False)(*args)):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-13)


def test_the_root_has_the_sign_of_zero_and_no_slope_in_its_clamp():
    scores = jnp.array([0.0, -0.0, 5e-7, -5e-7, 4e-6, -4e-6])
    roots, pull = jax.vjp(reference.signed_root, scores)
    np.testing.assert_allclose(roots, [1e-3, -1e-3, 1e-3, -1e-3, 2e-3, -2e-3], rtol=1e-6)
    np.testing.assert_allclose(pull(jnp.ones(6))[0], [0, 0, 0, 0, 250, 250], rtol=1e-6)
