"""The base of every module: a container of parameters that is a JAX pytree. The only file that knows Flax.

Modules hold float32 arrays, other modules and static settings, have no hidden state, and are transformed with `jax.jit`, `jax.grad`,
`jax.lax.scan` and `jax.checkpoint` directly. Each class declares its parameters once, in `SPECS`: what their axes are called (for
sharding) and whether they decay. No maths lives here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray


@dataclass(frozen=True)
class Spec:
    """What a parameter's axes are called, and whether weight decay applies to it."""

    axes: tuple[str | None, ...]
    decay: bool = False

    def stacked(self) -> "Spec":
        """The spec of the same parameter of many layers, stacked along a new leading axis."""
        return Spec(("layers", *self.axes), self.decay)


class Module(nnx.Module):
    """A pytree whose leaves are the arrays among its attributes and those of its submodules. Subclasses describe them in `SPECS`."""

    SPECS: ClassVar[dict[str, Spec]] = {}
    STACKS: ClassVar[tuple[str, ...]] = ()  # submodules that are many layers stacked along axis 0

    def __setattr__(self, name: str, value: Any) -> None:
        # Flax recognises arrays by itself, but not the tracers of a module that is constructed under `jax.vmap`.
        super().__setattr__(name, nnx.data(value) if isinstance(value, (jax.Array, Module)) else value)


AnyModule = TypeVar("AnyModule", bound=Module)


def specs(model: Module) -> Any:
    """A pytree like `model` with a `Spec` in the place of every parameter."""

    def spec_of(path: tuple[Any, ...], _: Any) -> Spec:
        node, stacked = model, False
        for key in path[:-1]:
            stacked |= key.name in node.STACKS
            node = getattr(node, key.name)
        spec = node.SPECS[path[-1].name]
        return spec.stacked() if stacked else spec

    return jax.tree_util.tree_map_with_path(spec_of, model)


def named_parameters(model: Module) -> Iterator[tuple[str, Any]]:
    """Yields ("moe_layers.ffn.router", array) for every parameter."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        yield ".".join(key.name for key in path), leaf


def to_dict(model: Any) -> Any:
    """Parameters as nested dictionaries of arrays, free of Flax types: what checkpoints hold."""
    if not isinstance(model, Module):
        return model
    children = {key.name for path, _ in jax.tree_util.tree_leaves_with_path(model) for key in path[:1]}
    return {name: to_dict(getattr(model, name)) for name in sorted(children)}


def from_dict(like: AnyModule, values: Any) -> AnyModule:
    """The module shaped as `like` with the parameters of `to_dict`'s dictionaries."""

    def pick(path: tuple[Any, ...], _: Any) -> Any:
        node = values
        for key in path:
            node = node[key.name]
        return node

    return jax.tree_util.tree_map_with_path(pick, like)


def normal(key: PRNGKeyArray, shape: tuple[int, ...], std: float) -> Float[Array, "..."]:
    """Normal initial values, float32."""
    return std * jax.random.normal(key, shape, jnp.float32)
