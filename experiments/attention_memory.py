"""Temporaries of one layer's sparse attention, choice of keys included, as the TPU compiler counts them. Compiled, never run.

Temporaries are what a program needs beside its arguments and results. DeepSeek-V3.2's shape, bfloat16, one sequence.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mhc_jax.experiments.attention_modelled import TOPOLOGIES, K, Program, build
from mhc_jax.files import AnyPath, write_json
from pallas_kernels.static_cost import check_libtpu, compile_for

FILE = "memory.json"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Layer:
    """A layer that is compiled: choice of pages or tokens, and attention to them."""

    granularity: str  # "pages" or "tokens"
    queries: int
    keys: int
    backward: bool = False  # forward and backward of the attention; the choice has no gradient

    @property
    def key(self) -> str:
        return f"{self.granularity}/s{self.queries}_t{self.keys}{'_gradient' if self.backward else ''}"


LAYERS = tuple(
    Layer(granularity, *shape)
    for shape in ((128 * K, 128 * K), (128 * K, 128 * K, True), (4 * K, 1024 * K), (1, 1024 * K))
    for granularity in ("pages", "tokens")
)


def weigh_all(folder: AnyPath, say: Say, topologies: tuple[str, ...] = TOPOLOGIES) -> dict[str, Any]:
    """Bytes of temporaries by topology and layer, or the compiler's reason for refusing it; compiles what FOLDER/memory.json lacks."""
    path = folder / FILE
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    todo = [(topology, layer) for layer in LAYERS for topology in topologies if layer.key not in known.get(topology, {})]
    if not todo:
        return known
    try:
        check_libtpu()
    except ValueError as error:
        say(f"nothing is weighed: {error}")
        return known
    for number, (topology, layer) in enumerate(todo, start=1):
        say(f"weighing {layer.key} on {topology} ({number} of {len(todo)})")
        known.setdefault(topology, {})[layer.key] = _weighed(layer, topology)
        write_json(path, known)
    return known


def _weighed(layer: Layer, topology: str) -> int | str:
    try:
        memory = compile_for(topology, *layer_program(layer)).memory_analysis()
    except Exception as error:  # whatever the compiler raises: one layer that it refuses does not take the others with it
        return str(error).splitlines()[0][:300]
    return int(memory.temp_size_in_bytes) if memory else "the compiler does not tell"


def layer_program(layer: Layer) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The layer as a function, and the shapes of its arguments: those of the attention without what was chosen, and of the choice."""
    choose, of_choice = build(Program(f"select_{layer.granularity}", layer.queries, layer.keys))
    attend, of_attention = build(Program(layer.granularity, layer.queries, layer.keys))

    def forward(learnt: tuple[Any, ...], of_choice: tuple[Any, ...]) -> Any:
        return attend(*learnt, choose(*of_choice), of_choice[-1])

    def gradient(learnt: tuple[Any, ...], of_choice: tuple[Any, ...], cotangent: Any) -> Any:
        out, back = jax.vjp(partial(forward, of_choice=of_choice), learnt)
        return out, back(cotangent)

    learnt = of_attention[:-2]
    if not layer.backward:
        return forward, (learnt, of_choice)
    return gradient, (learnt, of_choice, jax.ShapeDtypeStruct(jax.eval_shape(forward, learnt, of_choice).shape, jnp.bfloat16))
