"""The stability measures on mappings whose gains are known on paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhc_jax.nn.decoder import Aux, SublayerTrace
from mhc_jax.nn.stability import backward_gain, composites, forward_gain, stability
from pallas_kernels.mhc import sinkhorn


def stacked(*sublayers) -> jax.Array:
    """[L, n, n, T] from L lists of T matrices."""
    return jnp.asarray(np.stack([np.stack(tokens, axis=-1) for tokens in sublayers]), jnp.float32)


def traced(res) -> Aux:
    layers, n, _, length = res.shape
    rows = jnp.ones((layers, n, length))
    trace = SublayerTrace(rows, rows, res, jnp.zeros(layers), jnp.ones((layers, n)), jnp.ones(layers))
    return Aux(
        max_attention_logit=jnp.zeros(layers // 2),
        indexer_loss=jnp.zeros(layers // 2),
        expert_load=jnp.zeros((0, 4), jnp.int32),
        balance_loss=jnp.zeros(()),
        trace=trace,
        final_stream_rms=jnp.ones(n),
        final_stream_cosine=jnp.ones(()),
        gates=None,
    )


DIAGONAL = np.diag([3.0, 0.5, 1.0])
PERMUTATION = np.eye(3)[[2, 0, 1]]
UPPER = np.array([[1.0, 2.0, 3.0], [0.0, 1.0, 4.0], [0.0, 0.0, 1.0]])
NEGATIVE = np.array([[1.0, -1.0, 0.0], [-2.0, -2.0, -2.0], [0.0, 0.0, 1.0]])


@pytest.mark.parametrize(("matrix", "forward", "backward"), [(DIAGONAL, 3, 3), (PERMUTATION, 1, 1), (UPPER, 6, 8), (NEGATIVE, 6, 3)])
def test_gain_is_the_largest_absolute_row_or_column_sum(matrix, forward, backward):
    """Absolute values of the sums, as published: not sums of absolute values."""
    h = stacked([matrix])
    assert float(forward_gain(h)[0]) == forward
    assert float(backward_gain(h)[0]) == backward


def test_gains_are_taken_per_token_and_then_averaged():
    h = stacked([UPPER, np.eye(3), -UPPER])
    assert float(forward_gain(h)[0]) == pytest.approx((6 + 1 + 6) / 3)
    assert float(backward_gain(h)[0]) == pytest.approx((8 + 1 + 8) / 3)


def test_products_run_from_the_first_sublayer_up_and_from_the_last_down():
    """x' = H x, so that later sublayers multiply from the left."""
    chain = [UPPER, PERMUTATION, DIAGONAL, NEGATIVE]
    upward, downward = composites(stacked(*([h] for h in chain)))
    for i in range(4):
        first_to_here, here_to_last = np.eye(3), np.eye(3)
        for h in chain[: i + 1]:
            first_to_here = h @ first_to_here
        for h in chain[i:]:
            here_to_last = h @ here_to_last
        assert np.allclose(upward[i, ..., 0], first_to_here, rtol=1e-6)
        assert np.allclose(downward[i, ..., 0], here_to_last, rtol=1e-6)
    assert not np.allclose(upward[1, ..., 0], UPPER @ PERMUTATION)
    s = stability(traced(stacked(*([h] for h in chain))))
    assert np.allclose(s.gain_forward_composite, forward_gain(upward))
    assert np.allclose(s.gain_backward_composite, backward_gain(downward))
    assert np.allclose(s.res_composite, upward[..., 0])
    assert np.allclose(s.res_composite_rest, downward[..., 0])
    assert float(s.gain_forward_composite[0]) == 6  # the first alone
    assert float(s.gain_backward_composite[-1]) == 3  # the last alone


def test_identity_has_gain_one_and_no_errors():
    s = stability(traced(jnp.broadcast_to(jnp.eye(4)[None, ..., None], (6, 4, 4, 5))))
    for name in ("gain_forward_single", "gain_backward_single", "gain_forward_composite", "gain_backward_composite"):
        assert np.array_equal(getattr(s, name), np.ones(6))
    for name in ("row_error", "column_error", "distance_identity"):
        assert np.array_equal(getattr(s, name), np.zeros(6))
    assert np.allclose(s.distance_uniform, np.sqrt(3))


def test_uniform_matrices_lie_at_distance_zero_from_uniform():
    s = stability(traced(jnp.full((2, 4, 4, 5), 0.25)))
    assert np.allclose(s.distance_uniform, 0, atol=1e-7)
    assert np.allclose(s.distance_identity, np.sqrt(3))


@pytest.mark.parametrize("std", [1.0, 6.0])
def test_sixty_mhc_mappings_keep_the_forward_gain_at_one_and_the_backward_gain_below_n(std):
    logits = jnp.asarray(std * np.random.default_rng(0).standard_normal((60, 4, 4, 32)), jnp.float32)
    s = stability(traced(jax.vmap(sinkhorn)(logits)))
    assert np.abs(np.asarray(s.gain_forward_composite) - 1).max() < 1e-5
    assert np.asarray(s.gain_backward_composite).max() <= 4
    assert np.asarray(s.row_error).max() < 1e-6


def test_errors_name_the_worst_row_and_column_of_any_token():
    off = np.eye(3)
    off[0, 1] = 0.25
    s = stability(traced(stacked([np.eye(3), off, np.eye(3)])))
    assert float(s.row_error[0]) == 0.25
    assert float(s.column_error[0]) == 0.25


def test_every_measure_is_documented_by_its_shape():
    s = stability(traced(jnp.broadcast_to(jnp.eye(4)[None, ..., None], (6, 4, 4, 5))))
    assert s.stream_norm.shape == (7, 4)
    assert s.stream_cosine.shape == (7,)
    assert s.pre.shape == s.post.shape == (6, 4)
    assert s.res.shape == s.res_composite.shape == s.res_composite_rest.shape == (6, 4, 4)
