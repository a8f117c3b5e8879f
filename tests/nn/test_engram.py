"""Engram in the network: against an oracle, causal, blind to other documents, and the same token by token as all at once."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ngrams_made import made
from oracles.engram_gate import conv_add
from oracles.ngrams import row_of, window_at
from small import make, make_batch, only, relative, small, temporary_bytes, tree_relative, widened

from mhc_jax.engram_config import EngramConfig
from mhc_jax.nn.decoder import batch_loss, hidden_states, initial_router_bias
from mhc_jax.nn.engram import ConvState, Engram, reach_of
from mhc_jax.nn.ngram_hash import hash_numbers, next_rows

ENGRAM = EngramConfig(layers=(1, 2), table_sizes=(101, 211), heads=2, head_dim=4)
B, S = 2, 16


def config_of(engram=ENGRAM, **changes):
    return dataclasses.replace(small(**changes), engram=engram)


def memory_of(config, length=S, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal((B, length, config.engram.width)), dtype) for _ in config.engram.layers)


def awake(module, seed=1):
    """The module with gains that differ and a convolution that does something."""
    rng = np.random.default_rng(seed)

    def change(path, p):
        spread = {"query_gain": 0.5, "key_gain": 0.5, "conv": 0.5, "conv_gain": 0.5}.get(path[-1].name, 0.0)
        return p + jnp.asarray(spread * rng.standard_normal(p.shape), p.dtype)

    return jax.tree_util.tree_map_with_path(change, module)


@cache
def module_of(residual="mhc", conv=True):
    config = config_of(dataclasses.replace(ENGRAM, conv=conv), residual=residual)
    return config, awake(jax.jit(lambda: Engram(config, jax.random.key(0)))())


SEGMENTS = np.array([[1] * 7 + [2] * 9, [1] * 2 + [2] * 3 + [3] * 11])


@pytest.mark.parametrize("residual", ["residual", "mhc"])
def test_the_module_equals_the_oracle(float64, residual):
    config, module = module_of(residual)
    module, n, width = widened(module), len(module_of(residual)[1].query_gain), config.dim
    x = np.random.default_rng(2).standard_normal((B, S, n * width))
    memory = memory_of(config, dtype=jnp.float64)[0]
    got, gates = module(jnp.asarray(x), memory, reach_of(jnp.asarray(SEGMENTS), False))
    for b in range(B):
        keys_value = np.asarray(memory[b]) @ np.asarray(module.keys_value)
        keys, value = keys_value[:, :-width].reshape(S, n, width), keys_value[:, -width:]
        gain = np.asarray(module.query_gain * module.key_gain)
        streams = x[b].reshape(S, n, width)
        wanted, alpha = conv_add(
            streams, keys, value, gain, np.asarray(module.conv), np.asarray(module.conv_gain), SEGMENTS[b], config.norm_eps, 1e-5
        )
        assert relative(got[b], wanted.reshape(S, -1)) < 1e-12
        assert relative(gates.reshape(n, B, S)[:, b].T, alpha) < 1e-12


def test_a_new_convolution_adds_nothing():
    config = config_of()
    fresh = jax.jit(lambda: Engram(config, jax.random.key(0)))()
    without = dataclasses.replace(config, engram=dataclasses.replace(ENGRAM, conv=False))
    plain = jax.jit(lambda: Engram(without, jax.random.key(0)))()
    x, memory = jnp.asarray(np.random.default_rng(0).standard_normal((B, S, 4 * config.dim)), jnp.float32), memory_of(config)[0]
    reach = reach_of(jnp.asarray(SEGMENTS), False)
    assert relative(fresh(x, memory, reach)[0], plain(x, memory, reach)[0]) < 1e-6


def test_reach_counts_tokens_of_the_same_document():
    assert reach_of(jnp.asarray([[1, 1, 1, 2, 2, 0, 0, 0]]), False).tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert reach_of(jnp.asarray([[1, 1, 1, 2]]), True).tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("cross", only([False], [False, True]))
def test_what_a_token_read_reaches_later_tokens_of_its_document_alone(cross):
    """By exact zeros in the gradient for what was read. `cross` lets the convolution reach over, but attention does not."""
    config = config_of(dataclasses.replace(ENGRAM, cross_documents=cross), residual="residual")
    model, memory = awake(make(config)), memory_of(config)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (B, S)))
    segments = jnp.asarray(SEGMENTS)
    weight = jnp.asarray(np.random.default_rng(1).standard_normal(config.dim), jnp.float32)

    @jax.jit
    def by_input(t):
        def out(memory):
            hidden, _ = hidden_states(model, tokens, segments * 0, segments, initial_router_bias(config), memory=memory)
            return hidden[0, t] @ weight

        return sum(jnp.abs(g[0]).max(axis=-1) for g in jax.grad(out)(memory))

    for t in (0, 6, 7, 9, 15):
        seen = np.asarray(by_input(t)) > 0
        start = 0 if t < 7 else 7
        own = [start <= s <= t for s in range(S)]
        if not cross:
            assert np.array_equal(seen, own)
        else:
            assert not seen[t + 1 :].any() and seen[own].all()
            assert seen[:start].any() == (t >= 7)


@pytest.mark.slow
@pytest.mark.parametrize("conv", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_token_by_token_equals_all_at_once(conv):
    """Rows by the hash on the device, and the module with its state: chunks of 1, 3 and more tokens."""
    config, module = module_of("mhc", conv)
    engram, length = config.engram, 12
    artifact = made(engram, 48)
    numbers = hash_numbers(artifact.multipliers, artifact.primes, artifact.offsets)
    classes = np.random.default_rng(3).integers(0, 48, (B, length))
    tables = [np.random.default_rng(4).standard_normal((rows, engram.head_dim)).astype(np.float32) for rows in artifact.rows]
    x = jnp.asarray(np.random.default_rng(5).standard_normal((B, length, 4 * config.dim)), jnp.float32)

    whole = np.array(
        [
            [
                [
                    row_of(window_at(list(row), None, t, 3, artifact.pad), m, p, engram.orders)
                    for m, p in zip(artifact.multipliers, artifact.primes)
                ]
                for t in range(length)
            ]
            for row in classes
        ]
    )
    read = jnp.asarray(tables[0][whole[:, :, 0]]).reshape(B, length, -1)
    wanted, _ = module(x, read, reach_of(jnp.ones((B, length), jnp.int32), False))

    window = jnp.full((B, 2), artifact.pad)
    state, got, at = ConvState.empty(B, 4, config.dim), [], 0
    for size in (1, 1, 3, 1, 6):
        part, every = slice(at, at + size), jnp.full(B, size)
        rows, window = next_rows(jnp.asarray(classes[:, part]), window, every, numbers, engram.orders)
        np.testing.assert_array_equal(rows, whole[:, part])
        out, state = module.decode(x[:, part], jnp.asarray(tables[0])[rows[:, :, 0]].reshape(B, size, -1), state, every)
        got.append(out)
        at += size
    assert relative(jnp.concatenate(got, axis=1), wanted) < 1e-6


@cache
def differentiated(policy, residual="mhc", layers=(1,)):
    config = config_of(dataclasses.replace(ENGRAM, layers=layers), remat=policy, residual=residual, num_layers=2)
    model = awake(make(dataclasses.replace(config, remat="none")))
    model.config = config
    batch, memory = make_batch(config, sequences=B), memory_of(config)

    def loss(model, memory):
        return batch_loss(model, batch, initial_router_bias(config), memory=memory)[0]

    f = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(model, memory).compile()
    return f(model, memory), temporary_bytes(f)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["streams", "matmuls", "full"])
def test_recomputation_leaves_gradients_alone(policy):
    (loss, grads), _ = differentiated(policy, "residual")
    (loss_kept, grads_kept), _ = differentiated("none", "residual")
    assert float(loss) == pytest.approx(float(loss_kept), rel=1e-6)
    assert tree_relative(jax.tree.leaves(grads), jax.tree.leaves(grads_kept)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("residual", only(["residual"], ["residual", "hc", "identity_hc"]))
def test_every_kind_of_residual_takes_a_memory(residual):
    (loss, grads), _ = differentiated("none", residual)
    assert np.isfinite(float(loss))
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves((grads[0].engram, grads[1])))


@pytest.mark.parametrize("layers", only([(0, 2)], [(0,), (1,), (0, 2)]))
def test_a_memory_of_zeros_leaves_the_network_as_it_is(layers):
    """And layers that stand in pieces of a scan are those of one scan."""
    config = config_of(dataclasses.replace(ENGRAM, layers=layers), num_layers=3)
    model, batch = make(config), make_batch(config, sequences=B)
    without = make(dataclasses.replace(config, engram=None))
    nothing = tuple(jnp.zeros_like(m) for m in memory_of(config))
    bias = initial_router_bias(config)
    got, wanted = (
        jax.jit(lambda m, read: batch_loss(m, batch, bias, memory=read)[0])(m, read) for m, read in ((model, nothing), (without, ()))
    )
    assert float(got) == pytest.approx(float(wanted), rel=1e-6)


@pytest.mark.slow
def test_gates_of_the_first_sequence_are_reported():
    config = config_of()
    model, batch = make(config), make_batch(config, sequences=B)
    aux = jax.jit(lambda m: batch_loss(m, batch, initial_router_bias(config), memory=memory_of(config), trace=True)[2])(model)
    assert aux.gates.shape == (2, 4, S)
    assert 0 < float(aux.gates.min()) < float(aux.gates.max()) < 1


def test_a_memory_for_each_layer_is_asked_for():
    config = config_of()
    with pytest.raises(ValueError, match="memory holds 0 arrays, but 2 layers have a memory"):
        batch_loss(make(config), make_batch(config), initial_router_bias(config))
