"""Routing and experts against their oracle: who goes where, with what weight, and that nobody is lost."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import moe as oracle
from small import directional, relative, small, tree_relative, widened

from mhc_jax.nn.experts import _one_by_one, _routed, blocked, ragged, routed_swiglu
from mhc_jax.nn.moe import MoE, Routing, balance_loss, expert_load, route, updated_bias
from mhc_jax.parallel.rules import Rules

T, C = 14, 16


def tokens(count: int = T, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, C))


ROUTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"moe__routed_scaling": 2.5},
    "all experts": {"moe__top_k": 4},
    "one of many": {"moe__num_experts": 16, "moe__top_k": 1},
    "groups": {"moe__num_experts": 12, "moe__num_groups": 4, "moe__top_groups": 2, "moe__top_k": 3, "moe__routed_scaling": 2.5},
    "groups of one": {"moe__num_experts": 6, "moe__num_groups": 6, "moe__top_groups": 3, "moe__top_k": 2},
    "no shared expert": {"moe__shared_experts": 0},
    "two shared experts": {"moe__shared_experts": 2},
}


@pytest.mark.parametrize("bias_mean", [0.0, -3.0])  # at -3 all biased affinities are negative: closed groups must stay closed
@pytest.mark.parametrize("case", ROUTINGS)
def test_layer_equals_the_oracle(float64, case, bias_mean):
    config = small(init_std=0.4, **ROUTINGS[case])
    e, module = config.moe, widened(MoE(config, jax.random.key(0)))
    bias = bias_mean + 0.3 * np.random.default_rng(1).standard_normal(e.num_experts)
    p = {n: np.asarray(getattr(module, n)) for n in ("router", "inner", "out")}
    if module.shared is not None:
        p |= {"shared_inner": np.asarray(module.shared.inner), "shared_out": np.asarray(module.shared.out)}
    wanted, load = oracle.moe(tokens(), p, bias, top_k=e.top_k, groups=e.num_groups, top_groups=e.top_groups, scaling=e.routed_scaling)
    y, got_load, _ = jax.jit(lambda m, x, b: m(x, b, Rules()))(module, jnp.asarray(tokens())[None], jnp.asarray(bias))
    assert relative(y[0], wanted) < 1e-12
    assert np.array_equal(got_load, load)
    assert load.sum() == T * e.top_k


def test_a_bias_changes_who_is_chosen_and_never_the_weights_of_the_same_choice(float64):
    config = small(moe__top_k=2).moe
    x, router = jnp.asarray(tokens()), jnp.asarray(np.random.default_rng(1).standard_normal((C, 4)))
    plain = route(x, router, jnp.zeros(4), config)
    pushed = route(x, router, jnp.asarray([5.0, 0, 0, 0]), config)
    assert (np.asarray(pushed.experts) == 0).any(axis=1).all()
    assert not (np.asarray(plain.experts) == 0).any(axis=1).all()
    assert np.array_equal(pushed.affinity, plain.affinity)
    unchanged = 0
    for t in range(T):
        a, b = (dict(zip(np.asarray(r.experts[t]).tolist(), np.asarray(r.weights[t]).tolist())) for r in (plain, pushed))
        if a.keys() == b.keys():
            assert a == pytest.approx(b, rel=1e-15)
            unchanged += 1
    assert 0 < unchanged < T


def test_weights_sum_to_the_routed_scaling_and_carry_gradients_but_the_bias_does_not():
    config = small(moe__routed_scaling=2.5).moe
    x, router = jnp.asarray(tokens(), jnp.float32), jnp.asarray(np.random.default_rng(1).standard_normal((C, 4)), jnp.float32)
    assert np.allclose(route(x, router, jnp.zeros(4), config).weights.sum(axis=1), 2.5, rtol=1e-6)
    by_router, by_bias = jax.grad(lambda r, b: route(x, r, b, config).weights[:, 0].sum(), argnums=(0, 1))(router, jnp.zeros(4))
    assert np.abs(by_router).max() > 1e-3
    assert np.all(np.asarray(by_bias) == 0)


LAYOUTS = {
    "ragged": partial(_routed, layout=ragged),
    "blocked by 128": partial(_routed, layout=blocked),
    "blocked by 4": partial(_routed, layout=partial(blocked, block=4)),
    "blocked by 5": partial(_routed, layout=partial(blocked, block=5)),
    "blocked by 1": partial(_routed, layout=partial(blocked, block=1)),
    "one by one": _one_by_one,
}
SPREADS = {
    "random": lambda rng: np.argsort(rng.standard_normal((T, 6)), axis=1)[:, :2],
    "all to one": lambda rng: np.tile([4, 1], (T, 1)),
    "some experts empty": lambda rng: np.where(np.arange(T)[:, None] < 3, [3, 5], [0, 5]),
}


def visits(spread: str):
    rng = np.random.default_rng(3)
    arrays = [tokens(), rng.uniform(0.1, 1, (T, 2)), rng.standard_normal((6, C, 10)), rng.standard_normal((6, 5, C))]
    return jnp.asarray(SPREADS[spread](rng)), [jnp.asarray(a) for a in arrays]


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_sum_over_the_visits_and_its_gradients(float64, layout, spread):
    """No token is dropped, also when all go to the same experts; values from the oracle, gradients of the plainest formula."""
    experts, args = visits(spread)
    weight = jnp.asarray(tokens(seed=5))

    def dense(x, weights, inner, out):  # every expert for every token, then the chosen ones
        gate, up = jnp.split(jnp.einsum("tc,ecf->tef", x, inner), 2, axis=-1)
        every = jnp.einsum("tef,efc->tec", jax.nn.silu(gate) * up, out)
        return jnp.einsum("tk,tkc->tc", weights, jnp.take_along_axis(every, experts[..., None], axis=1))

    def sparse(x, weights, inner, out):
        return LAYOUTS[layout](x, experts, weights, inner, out)

    def value_and_gradients(f):
        y, pull = jax.vjp(f, *args)
        return y, pull(weight)

    x, weights, inner, out = map(np.asarray, args)
    wanted = [
        sum(w * oracle.swiglu(x[t], inner[e, :, :5], inner[e, :, 5:], out[e]) for e, w in zip(np.asarray(experts[t]), weights[t]))
        for t in range(T)
    ]
    got = jax.jit(lambda: value_and_gradients(sparse))()
    assert relative(got[0], np.stack(wanted)) < 1e-12
    assert tree_relative(got, jax.jit(lambda: value_and_gradients(dense))()) < 1e-12


@pytest.mark.parametrize("which", range(4))
def test_gradients_equal_central_differences(float64, which):
    experts, args = visits("random")
    weight, direction = jnp.asarray(tokens(seed=5)), np.random.default_rng(6).standard_normal(args[which].shape)

    @jax.jit
    def f(v):
        inputs: list[Any] = [*args[:which], v, *args[which + 1 :]]
        return (weight * routed_swiglu(inputs[0], experts, *inputs[1:])).sum()

    slope = float((np.asarray(jax.grad(f)(args[which])) * direction).sum())
    assert slope == pytest.approx(directional(f, np.asarray(args[which]), direction, 1e-3), rel=1e-8)


def test_a_balanced_router_pays_exactly_alpha(float64):
    config = small(moe__num_experts=8, moe__top_k=2, moe__balance_loss=1e-4).moe
    experts = jnp.asarray([[(2 * t) % 8, (2 * t + 1) % 8] for t in range(32)])
    even = Routing(experts, jnp.ones((32, 2)), jnp.full((32, 8), 0.3))
    assert float(balance_loss(even, 2, config)) == pytest.approx(1e-4, rel=1e-14)


def test_the_balance_loss_of_a_collapsed_router_and_its_direction(float64):
    """All visits to the same k of E experts that also hold all the affinity: alpha * E / k. Descending it lowers a crowded affinity."""
    config = small(moe__num_experts=8, moe__top_k=2, moe__balance_loss=1e-4).moe
    experts = jnp.tile(jnp.asarray([[3, 6]]), (32, 1))
    affinity = jnp.zeros((32, 8)).at[:, jnp.asarray([3, 6])].set(0.9)
    assert float(balance_loss(Routing(experts, jnp.ones((32, 2)), affinity), 2, config)) == pytest.approx(4e-4, rel=1e-14)
    slope = jax.grad(lambda a: balance_loss(Routing(experts, jnp.ones((32, 2)), a), 2, config))(jnp.full((32, 8), 0.5))
    assert (np.asarray(slope)[:, [3, 6]] > 0).all()
    assert (np.asarray(slope)[:, [0, 1, 2, 4, 5, 7]] < 0).all()


def test_balance_is_judged_within_each_sequence(float64):
    config = small(moe__num_experts=4, moe__top_k=1, moe__balance_loss=1.0).moe
    experts = jnp.repeat(jnp.arange(2), 8)[:, None]  # sequence 0 visits expert 0 only, sequence 1 expert 1 only
    affinity = jax.nn.one_hot(experts[:, 0], 4) + 1e-12
    routing = Routing(experts, jnp.ones((16, 1)), affinity)
    assert float(balance_loss(routing, 2, config)) == pytest.approx(4.0, rel=1e-9)
    assert float(balance_loss(routing, 1, config)) == pytest.approx(2.0, rel=1e-9)


def test_biases_rise_for_experts_below_the_mean_load_and_fall_above():
    bias = updated_bias(jnp.zeros((2, 4)), jnp.asarray([[10, 2, 4, 0], [4, 4, 4, 4]]), 1e-3)
    assert np.allclose(bias, np.array([[-1e-3, 1e-3, 0, 1e-3], [0, 0, 0, 0]]), atol=1e-12)


def test_loads_of_parts_of_a_batch_add_up_and_it_is_the_sum_that_counts():
    first, second = jnp.asarray([[0, 1]] * 6), jnp.asarray([[2, 0]] * 2 + [[2, 3]] * 8)
    loads = [expert_load(part, 4) for part in (first, second)]
    whole = expert_load(jnp.concatenate([first, second]), 4)
    assert np.array_equal(loads[0] + loads[1], whole)
    assert int(whole.sum()) == 16 * 2
    by_sum = updated_bias(jnp.zeros(4), whole, 1.0)
    by_parts = updated_bias(updated_bias(jnp.zeros(4), loads[0], 0.5), loads[1], 0.5)
    assert np.array_equal(by_sum, [0.0, 1.0, -1.0, 0.0])
    assert not np.array_equal(by_sum, by_parts)
