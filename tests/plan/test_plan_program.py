"""The formula of FLOPs against the traced program: every matrix product that the decoder does, counted from its shapes."""

from collections.abc import Iterator
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from small import BASE

from mhc_jax.config import Config, override
from mhc_jax.nn.decoder import Decoder, hidden_states, unembedded
from mhc_jax.plan.flops import forward_flops

LENGTH = 16


def products(jaxpr: Any) -> Iterator[int]:
    """FLOPs of every matrix product; a loop's body counts as often as it runs."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            yield 2 * prod(equation.outvars[0].aval.shape) * prod(left[axis] for axis in contracted)
            continue
        assert equation.primitive.name not in ("while", "cond"), "how often it runs is not known"
        for inner in equation.params.values():
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from (flops * equation.params.get("length", 1) for flops in products(inner))


def program(config: Config) -> float:
    """FLOPs of matrix products a token, forward, one sequence of LENGTH tokens."""

    def logits(model: Decoder, tokens: jax.Array) -> jax.Array:
        bias = jnp.zeros((0, config.model.moe.num_experts))
        return unembedded(model, hidden_states(model, tokens, tokens, tokens, bias)[0])

    model = jax.eval_shape(lambda: Decoder(config.model, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    return sum(products(jax.make_jaxpr(logits)(model, tokens).jaxpr)) / LENGTH


def formula(config: Config) -> float:
    """The same by the formula, without causality, which one block of masked scores does not have."""
    parts = dict(forward_flops(config, LENGTH).parts)
    parts["attention scores and values"] *= 2 * LENGTH / (LENGTH + 1)
    return sum(parts.values())


def dense(**changes: Any) -> Config:
    """Without experts, whose products on a CPU depend on where tokens go."""
    own = {"model.dense_layers": BASE.model.num_layers, "model.attention.query_block": LENGTH}
    return override(BASE, own | {f"model.{path.replace('__', '.')}": value for path, value in changes.items()})


@pytest.mark.parametrize("q_rank", [None, 10])
def test_the_plain_decoder_multiplies_what_the_formula_says(q_rank):
    config = dense(residual="residual", attention__q_rank=q_rank)
    assert program(config) == formula(config)


def test_mappings_are_the_products_that_the_kinds_differ_by():
    """The mixing itself, which is no matrix product or a small one, is the same for both kinds of a pair."""
    found = {kind: program(dense(residual=kind)) for kind in ("static_hc", "hc", "identity_hc", "mhc", "mhc_lite", "kromhc")}
    columns = {"static_hc": 0, "hc": 6, "identity_hc": 8, "mhc": 24, "mhc_lite": 32, "kromhc": 12}
    of_res = {"mhc_lite": 2 * 16 * 24, "kromhc": 2 * (2 * 4 * 2)}  # weights times permutation matrices
    for kind, flops in found.items():
        assert flops - found["static_hc"] == 6 * (2 * 4 * 16 * columns[kind] + of_res.get(kind, 0))
