"""The chunked cross-entropy equals the naive one, and never holds all logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import directional, relative, temporary_bytes

from mhc_jax.nn.loss import next_token_loss

B, S, C, V = 2, 11, 6, 17


def inputs(seed: int = 0):
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, V, (B, S))
    targets[0, 3], targets[1, -1], targets[1, :2] = -1, -1, -7
    return rng.standard_normal((B, S, C)), rng.standard_normal((C, V)), targets


def naive(hidden, unembed, targets) -> float:
    """Float64 NumPy, one position at a time."""
    total = 0.0
    for h, t in zip(hidden.reshape(-1, C), targets.reshape(-1)):
        if t >= 0:
            logits = h @ unembed
            total += np.log(np.exp(logits).sum()) - logits[t]
    return total


@pytest.mark.parametrize("chunk", [1, 4, 11, 512])
def test_value_and_gradients_equal_the_naive_loss(float64, chunk):
    hidden, unembed, targets = inputs()
    fast = jax.jit(lambda h, u: next_token_loss(h, u, jnp.asarray(targets), chunk)[0])
    total, count = next_token_loss(jnp.asarray(hidden), jnp.asarray(unembed), jnp.asarray(targets), chunk)
    assert float(total) == pytest.approx(naive(hidden, unembed, targets), rel=1e-13)
    assert int(count) == B * S - 4
    grads = jax.grad(lambda h, u: 3 * fast(h, u), argnums=(0, 1))(jnp.asarray(hidden), jnp.asarray(unembed))
    rng = np.random.default_rng(1)
    for i, (grad, at) in enumerate(zip(grads, (hidden, unembed))):
        direction = rng.standard_normal(grad.shape)
        moved = directional(lambda v, i=i: 3 * (naive(v, unembed, targets) if i == 0 else naive(hidden, v, targets)), at, direction, 1e-3)
        assert float((np.asarray(grad) * direction).sum()) == pytest.approx(moved, rel=1e-9)


def test_positions_without_a_target_have_exactly_no_gradient():
    hidden, unembed, targets = inputs()
    args = [jnp.asarray(a, jnp.float32) for a in (hidden, unembed)]
    grad = jax.grad(lambda h: next_token_loss(h, args[1], jnp.asarray(targets), 4)[0])(args[0])
    assert np.array_equal(np.abs(np.asarray(grad)).max(axis=-1) > 0, targets >= 0)


def test_a_batch_without_targets_costs_nothing():
    hidden, unembed, targets = inputs()
    total, count = next_token_loss(jnp.asarray(hidden, jnp.float32), jnp.asarray(unembed, jnp.float32), jnp.asarray(0 * targets - 1), 4)
    assert float(total) == 0
    assert int(count) == 0


def test_bfloat16_hidden_states_are_summed_in_float32():
    hidden, unembed, targets = inputs()
    rounded = jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(unembed, jnp.bfloat16)
    total, _ = next_token_loss(rounded[0], rounded[1].astype(jnp.float32), jnp.asarray(targets), 4)
    assert total.dtype == jnp.float32
    assert relative(total, naive(np.asarray(rounded[0], np.float64), np.asarray(rounded[1], np.float64), targets)) < 1e-5


def test_temporary_memory_is_far_below_the_logits_of_all_tokens():
    length, vocab = 2048, 4096
    shapes = ((1, length, 8), jnp.float32), ((8, vocab), jnp.float32), ((1, length), jnp.int32)

    def temporary(chunk):
        f = jax.jit(jax.value_and_grad(lambda h, u, t: next_token_loss(h, u, t, chunk)[0], argnums=(0, 1)))
        return temporary_bytes(f.lower(*(jax.ShapeDtypeStruct(*s) for s in shapes)).compile())

    every = length * vocab * 4
    assert temporary(128) < every / 4
    assert temporary(length) >= every  # the measure sees them where they exist
