"""The whole network: equal to the plain pre-norm model at step 0, alive after two steps, causal, and the same under every remat policy."""

import re
from collections import Counter
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import FORMS, make, make_batch, only, relative, shaken, small, temporary_bytes, tree_relative

from mhc_jax.nn import remat
from mhc_jax.nn.decoder import batch_loss, hidden_states, initial_router_bias, learnable_mappings, logits
from mhc_jax.nn.module import named_parameters
from mhc_jax.nn.residual.socket import Connection
from mhc_jax.nn.stability import stability
from mhc_jax.train.optimizer import update_mask

LAYERS = 2
slow = pytest.mark.slow


def network(kind: str, **changes):
    return small(residual=kind, num_layers=LAYERS, **changes)


def first_logits(config) -> np.ndarray:
    batch = make_batch(config)
    run = jax.jit(lambda m: logits(m, batch["tokens"], batch["positions"], batch["segment_ids"], initial_router_bias(config)))
    return np.asarray(run(make(config)))


@cache
def plain_logits() -> np.ndarray:
    return first_logits(network("residual"))


STARTS = [(kind, collapse) for kind in FORMS[1:] for collapse in ("mean", "sum", "learned") if kind != "kromhc"]
STARTS += [("mhc_lite", "mean"), ("kromhc", "sum")]
START_CASES = [pytest.param(*start, marks=[] if start in {("mhc", "mean"), ("hc", "sum")} else slow) for start in STARTS]


@pytest.mark.parametrize(("kind", "collapse"), START_CASES)
def test_at_step_0_every_kind_is_the_plain_pre_norm_network(kind, collapse):
    assert np.abs(plain_logits()).max() > 0.1
    assert relative(first_logits(network(kind, connections__collapse=collapse)), plain_logits()) < 1e-5


@pytest.mark.parametrize("kind", only(["mhc"], FORMS[1:]))
def test_shared_parameters_start_equal_to_the_bit(kind):
    plain, other = (dict(named_parameters(make(network(k), impl="threefry2x32"))) for k in ("residual", kind))
    assert set(plain) < set(other)
    for name, value in plain.items():
        assert np.array_equal(value, other[name]), name
    assert all("connection." in name for name in set(other) - set(plain))


def connections(model) -> list[tuple[int, Connection]]:
    """(sublayer, its connection or gradients of it), unstacked, in the order of the network."""
    out = []
    for stack, start in ((model.dense_layers, 0), (model.moe_layers, model.config.dense_layers)):
        for layer in range(stack.attention_norm.shape[0]):
            for place, part in enumerate((stack.attention_connection, stack.ffn_connection)):
                out.append((2 * (start + layer) + place, jax.tree.map(lambda p, i=layer: p[i], part)))
    return out


def sizes(model) -> dict[tuple[int, str, str], float]:
    """Largest absolute value of every mapping's slice of every connection parameter of every sublayer."""
    out: dict[tuple[int, str, str], float] = {}
    for sublayer, part in connections(model):
        for name, lengths in part.groups().items():
            pieces = np.split(np.abs(np.asarray(getattr(part, name))), np.cumsum(lengths)[:-1])
            out |= {(sublayer, name, mapping): float(p.max()) for mapping, p in zip(("pre", "post", "res"), pieces)}
    return out


@cache
def gradients_after_two_steps(kind: str) -> dict[tuple[int, str, str], float]:
    config = network(kind)
    batch, bias = make_batch(config, sequences=4), initial_router_bias(config)
    gradient = jax.jit(jax.grad(lambda m: batch_loss(m, batch, bias)[0] / batch["targets"].size))
    optimizer = optax.adamw(1e-3, b1=0.9, b2=0.95, eps=1e-20, weight_decay=0.0)
    model = make(config)
    state = optimizer.init(model)

    @jax.jit
    def update(model, state, grads):
        masked = jax.tree.map(jnp.multiply, grads, update_mask(model))
        updates, state = optimizer.update(masked, state, model)
        return optax.apply_updates(model, updates), state

    for _ in range(2):
        model, state = update(model, state, gradient(model))
    return sizes(gradient(model))


def cannot_learn(kind: str) -> set[tuple[int, str]]:
    table = learnable_mappings(network(kind))
    return {(s, m) for s in range(2 * LAYERS) for m, learns in zip(("pre", "post", "res"), table[s]) if not learns}


@pytest.mark.parametrize("kind", only(["mhc"], FORMS[1:]))
def test_after_two_steps_every_mapping_of_every_sublayer_has_a_gradient(kind):
    dead = cannot_learn(kind)
    of_res = {"mhc": {(0, "res")}, "kromhc": {(0, "res"), (2 * LAYERS - 1, "res")}}
    assert dead == {(0, "pre")} | of_res.get(kind, set())
    for (sublayer, name, mapping), size in gradients_after_two_steps(kind).items():
        if (sublayer, mapping) not in dead:
            assert size > 0, (sublayer, name, mapping)


@pytest.mark.parametrize("kind", only(["mhc"], [kind for kind in FORMS[1:] if kind != "kromhc"]))
def test_what_the_update_mask_stops_is_rounding_noise(kind):
    """The gradients that the mask removes are orders of magnitude below the same mapping's elsewhere.

    In float32 and after two steps, when the streams have hardly parted; `test_connections` shows the same in float64 with distinct streams.
    kromhc is left out: H_res starts so near the identity that its gradients are near rounding everywhere so soon.
    """
    grads = gradients_after_two_steps(kind)
    for sublayer, mapping in cannot_learn(kind):
        for name in {name for _, name, _ in grads}:
            elsewhere = [grads[s, name, mapping] for s in range(1, 2 * LAYERS - 1)]
            assert grads[sublayer, name, mapping] < 1e-2 * min(elsewhere)


@pytest.mark.parametrize("kind", only(["mhc"], FORMS))
def test_a_gradient_never_comes_from_a_later_token_or_another_document(kind):
    """Exactly zero for later positions and other segments, nonzero for all earlier ones of the same segment."""
    config = network(kind)
    model, bias, length = shaken(make(config)), initial_router_bias(config), 16
    tokens = jnp.asarray(np.random.default_rng(0).permutation(config.vocab_size)[None, :length])  # distinct: a row of the table each
    segments, positions = jnp.asarray([[1] * 7 + [2] * 9]), jnp.asarray([[*range(7), *range(9)]])
    weight = jnp.asarray(np.random.default_rng(1).standard_normal(config.dim), jnp.float32)

    @jax.jit
    def by_input(t):
        def out(model):
            return hidden_states(model, tokens, positions, segments, bias)[0][0, t] @ weight

        return jnp.abs(jax.grad(out)(model).embedding[tokens[0]]).max(axis=-1)

    for t in (0, 5, 6, 7, 11, 15):
        start = 0 if t < 7 else 7
        assert np.array_equal(np.asarray(by_input(t)) > 0, [start <= s <= t for s in range(length)])


@cache
def differentiated(policy: str, unrolled: bool = True):
    """Loss, leaves of the gradients and temporary memory under a policy, with the layers unrolled or in a loop."""
    config = small(remat=policy, dense_layers=0)
    model, batch = shaken(make(small(dense_layers=0))), make_batch(config, sequences=4, length=64)  # long enough for the streams to count
    model.config = config
    f = jax.jit(jax.value_and_grad(lambda m: batch_loss(m, batch, initial_router_bias(config))[0]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remat, "LONGEST_UNROLLED", 8 if unrolled else 0)
        lowered = f.lower(model)
    compiled = lowered.compile()
    loss, grads = compiled(model)
    return float(loss), jax.tree.leaves(grads), temporary_bytes(compiled)


@pytest.mark.slow
@pytest.mark.parametrize("policy", only(["full"], ["streams", "matmuls", "attention", "full"]))
def test_remat_policies_save_memory_and_leave_gradients_alone(policy):
    loss, grads, memory = differentiated(policy)
    loss_kept, grads_kept, memory_kept = differentiated("none")
    assert loss == pytest.approx(loss_kept, rel=1e-6)
    assert tree_relative(grads, grads_kept) < 1e-5
    assert memory < memory_kept


def test_recomputed_streams_run_no_sublayer_again():
    """Under `streams` the backward pass repeats the seams' projections, one a sublayer, and no other product and no routing."""
    repeated = operations("streams") - operations("none")
    assert (repeated["dot_general"], repeated["top_k"]) == (2, 0)


def test_kept_attention_runs_once():
    """Under `attention` the backward pass repeats what `full` does, but for the products of the two blocks of queries, three each."""
    spared = operations("full") - operations("attention")
    assert (spared["dot_general"], spared["top_k"]) == (6, 0) and spared["exp"] == 2


@cache
def operations(policy: str) -> Counter[str]:
    """Primitives of the gradient's program."""
    config = small(remat=policy, dense_layers=0)
    model, batch = make(small(dense_layers=0)), make_batch(config)
    model.config = config
    text = str(jax.make_jaxpr(jax.grad(lambda m: batch_loss(m, batch, initial_router_bias(config))[0]))(model))
    return Counter(re.findall(r"= (\w+)[\[ ]", text))


@pytest.mark.slow
def test_layers_that_do_not_fill_a_block_are_run_too():
    config = small(num_layers=9, dense_layers=0, dim=8)
    assert remat.block_length(9, 4) == 2
    model, batch = shaken(make(config)), make_batch(config)

    def gradients(policy: str):
        model.config = small(num_layers=9, dense_layers=0, dim=8, remat=policy)
        return jax.jit(jax.grad(lambda m: batch_loss(m, batch, initial_router_bias(config))[0]))(model)

    assert tree_relative(jax.tree.leaves(gradients("streams")), jax.tree.leaves(gradients("none"))) < 1e-5


@pytest.mark.parametrize(("sublayers", "published"), [(60, 6.3), (24, 4.0)])
def test_a_block_is_as_long_as_equation_20_says(sublayers, published):
    assert abs(2 * remat.block_length(sublayers // 2, 4) - published) <= 2


@pytest.mark.slow
def test_layers_in_a_loop_give_the_gradients_of_unrolled_layers():
    loss, grads, memory = differentiated("none", unrolled=False)
    loss_unrolled, grads_unrolled, memory_unrolled = differentiated("none")
    assert loss == pytest.approx(loss_unrolled, rel=1e-6)
    assert tree_relative(grads, grads_unrolled) < 1e-5
    assert memory != memory_unrolled  # two programs


def test_bfloat16_keeps_mappings_in_float32():
    """Rows of H_res sum to one within 1e-6; an implementation with bfloat16 mappings measured 2.9e-3."""
    config = small(dtype="bfloat16")
    model, batch = shaken(make(config)), make_batch(config)
    total, _, aux = jax.jit(lambda m: batch_loss(m, batch, initial_router_bias(config), trace=True))(model)
    hidden, _ = jax.eval_shape(
        lambda m: hidden_states(m, batch["tokens"], batch["positions"], batch["segment_ids"], initial_router_bias(config)), model
    )
    assert hidden.dtype == jnp.bfloat16
    assert total.dtype == jnp.float32
    assert {a.dtype for a in aux.trace} == {jnp.dtype("float32")}
    s = stability(aux)
    assert np.asarray(s.row_error).max() < 1e-6
    assert np.abs(np.asarray(s.gain_forward_composite) - 1).max() < 1e-5
    assert np.asarray(s.gain_backward_composite).max() <= 4


def test_what_the_layers_report():
    config = small()
    model, batch = shaken(make(config)), make_batch(config)
    _, count, aux = jax.jit(lambda m: batch_loss(m, batch, initial_router_bias(config), trace=True))(model)
    assert int(count) == int((batch["targets"] >= 0).sum())
    assert np.array_equal(aux.expert_load.sum(axis=1), [batch["tokens"].size * config.moe.top_k] * 2)
    assert aux.trace.res.shape == (2 * config.num_layers, 4, 4, 16)
    assert np.allclose(aux.trace.stream_cosine[0], 1, atol=1e-6)
    assert (np.asarray(aux.trace.stream_cosine[1:]) < 0.999).all()
    assert aux.max_attention_logit.shape == (config.num_layers,)
