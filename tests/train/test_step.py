"""One step: the same whatever the number of microbatches or devices."""

from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from small import slowly, temporary_bytes

from mhc_jax.config import MeshConfig, override
from mhc_jax.parallel.mesh import make_mesh
from mhc_jax.parallel.rules import Rules
from mhc_jax.train import step as steps
from mhc_jax.train.step import gradients, initial_state, placed_initial_state, train_step

RULES = Rules()


def batch_of(config, seed=0):
    """Random tokens; sequences have very different numbers of targets."""
    rng = np.random.default_rng(seed)
    shape = (config.train.batch_size, config.data.seq_len)
    tokens = rng.integers(0, config.model.vocab_size, shape)
    targets = np.where(np.arange(shape[1]) < rng.integers(1, shape[1], (shape[0], 1)), np.roll(tokens, -1, axis=1), -1)
    positions = np.broadcast_to(np.arange(shape[1]), shape)
    arrays = {"tokens": tokens, "targets": targets, "positions": positions, "segment_ids": np.ones(shape)}
    return {name: jnp.asarray(x, jnp.int32) for name, x in arrays.items()}


def largest_error(a, b):
    """Over all leaves, relative to the leaf's largest entry."""
    return max(float(jnp.abs(x - y).max() / jnp.maximum(jnp.abs(y).max(), 1e-12)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


@cache
def gradients_of(config):
    return jax.jit(partial(gradients, config=config, rules=RULES))(initial_state(config), batch_of(config))


def test_accumulated_gradients_equal_the_whole_batchs(tiny):
    whole = override(tiny, {"model.moe.balance_loss": 0.1})
    expected = gradients_of(whole)
    actual = gradients_of(override(whole, {"train.microbatches": 4}))
    assert largest_error(actual.model, expected.model) < 1e-5
    for name in ("loss", "balance_loss", "max_attention_logit"):
        assert float(getattr(actual, name)) == pytest.approx(float(getattr(expected, name)), rel=1e-6)
    np.testing.assert_array_equal(actual.expert_load, expected.expert_load)


@pytest.mark.slow
def test_router_bias_moves_by_the_rate_against_the_load_of_the_whole_batch(tiny):
    config = override(tiny, {"model.moe.balance_loss": 0.1, "train.microbatches": 4})
    load = np.asarray(gradients_of(config).expert_load)
    assert load.sum() == config.tokens_per_step * config.model.moe.top_k
    new, _ = jax.jit(partial(train_step, config=config, rules=RULES))(initial_state(config), batch_of(config))
    np.testing.assert_allclose(new.router_bias, config.model.moe.bias_rate * np.sign(load.mean(axis=-1, keepdims=True) - load), rtol=1e-6)


def test_a_step_needs_no_second_copy_of_the_state(tiny):
    """Skipping must not keep the old state until the new one is complete. Nearly all of this state is embedding and output head."""
    config = override(tiny, {"model.residual": "residual", "model.num_layers": 1, "model.vocab_size": 50_000, "train.batch_size": 1})
    state = jax.eval_shape(lambda: initial_state(config))
    step = jax.jit(partial(train_step, config=config, rules=RULES), donate_argnums=0)
    temporary = temporary_bytes(step.lower(state, batch_of(config)).compile())
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert temporary < 0.8 * size  # gradients are a third of it


# The fast suite compares loss and gradients in tests/parallel; here three whole steps with their optimizer are run.
@pytest.mark.parametrize("kind", slowly(["mhc"], ["residual", "hc", "static_hc", "mhc", "identity_hc"]))
def test_eight_devices_train_as_one(tiny, kind):
    config = override(tiny, {"model.residual": kind})
    batches = [batch_of(config, seed) for seed in range(3)]

    def losses(mesh_config):
        on_mesh = override(config, {"mesh.data": mesh_config.data, "mesh.fsdp": mesh_config.fsdp})
        mesh = make_mesh(on_mesh.mesh)
        with jax.set_mesh(mesh):
            state = placed_initial_state(on_mesh, mesh, RULES)
            step = jax.jit(partial(train_step, config=on_mesh, rules=RULES))
            found = []
            for batch in batches:
                state, metrics = step(state, jax.device_put(batch, NamedSharding(mesh, RULES.spec("batch", None))))
                found.append(float(metrics.loss))
            return found, state

    alone, _ = losses(MeshConfig())
    together, state = losses(MeshConfig(data=2, fsdp=4))
    assert together == pytest.approx(alone, rel=1e-5)
    moments = state.optimizer[0].mu.unembed
    assert len(moments.addressable_shards) == 8
    assert moments.addressable_shards[0].data.shape[0] == config.model.dim // 4  # optimizer moments are split as their parameters


@pytest.mark.parametrize(("platform", "count", "asked"), [("tpu", 2, [True]), ("tpu", 1, [False]), ("cpu", 2, [False])])
def test_collectives_run_beside_products_on_several_tpus(platform, count, asked):
    compiled = Compilations(None)
    steps._compiled(compiled, devices(platform, count), None, pytest.fail)
    assert compiled.asked == asked


@pytest.mark.parametrize(("message", "memory"), [("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.", None), (None, 149)])
def test_where_that_takes_too_much_memory_the_step_is_compiled_without(message, memory):
    compiled, told = Compilations(message), []
    steps._compiled(compiled, devices("tpu", 2), memory, lambda: told.append(True))
    assert compiled.asked == [True, False] and told == [True]
    enough = Compilations(None)
    steps._compiled(enough, devices("tpu", 2), 150, pytest.fail)
    assert enough.asked == [True]


def test_another_failure_is_not_taken_for_want_of_memory():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        steps._compiled(Compilations("INTERNAL: Mosaic failed to compile"), devices("tpu", 2), None, pytest.fail)


def test_a_process_asks_its_own_devices_for_their_memory_so_that_all_decide_alike():
    other = SimpleNamespace(process_index=jax.process_index() + 1, memory_stats=pytest.fail)
    own = SimpleNamespace(process_index=jax.process_index(), memory_stats=lambda: {"bytes_limit": 7})
    assert steps._memory_here((other, own)) == 7
    assert steps._memory_here((other,)) is None


class Compilations:
    """Stands in for a lowered step and the compiled one, of 150 bytes; remembers the options, and may fail where there are some."""

    def __init__(self, message: str | None):
        self.message, self.asked = message, []

    def compile(self, compiler_options=None):
        self.asked.append(compiler_options == steps.BESIDE_COMPUTING)
        if compiler_options and self.message:
            raise jax.errors.JaxRuntimeError(self.message)
        return self

    def memory_analysis(self):
        sizes = {"argument": 60, "output": 60, "temp": 80, "alias": 50}
        return SimpleNamespace(**{f"{name}_size_in_bytes": size for name, size in sizes.items()})


def devices(platform: str, count: int) -> tuple[SimpleNamespace, ...]:
    return tuple(SimpleNamespace(platform=platform) for _ in range(count))
