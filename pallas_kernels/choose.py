"""Which implementation of a family runs: asked for by name, or what the platform and the shape allow. Knows no family."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.case import Implementation

NAMES = ("xla", "tpu", "gpu")
LANES = 128
SHARED_MEMORY = 222 * 1024  # bytes that a GPU kernel may plan with; a block of Hopper or Blackwell has 227 KiB
HOPPER = ("H100", "H200", "H800", "H20", "GH200")  # GPUs that the GPU kernels are made for, as their names in JAX have it


@dataclass(frozen=True)
class Kernels:
    """The functions of one implementation's module of a family, hashable so that JAX can keep what was traced for it."""

    family: str
    name: Implementation
    interpret: bool

    def __getattr__(self, function: str) -> Any:
        module = importlib.import_module(f"pallas_kernels.{self.family}.{self.name}")
        found = getattr(module, function)
        return found if self.name == "xla" else partial(found, interpret=self.interpret)


def choose(
    family: str,
    name: Implementation | None,
    interpret: bool,
    misfit: str | None,
    *,
    limit: Callable[[str], str | None] = lambda name: None,
) -> Kernels:
    """The family's implementation of this name; without one, the platform's kernels where the arrays fit them and XLA where they do not.

    `misfit` says what about the arrays no kernels can take, if anything, and `limit`, given a name, what the kernels of that name cannot.

    Raises:
      ValueError: the name is unknown, or its kernels cannot run here or cannot take these arrays.
    """
    if name is not None and name not in NAMES:
        raise ValueError(f"implementation is {name!r}; the known ones are {', '.join(NAMES)}, and None for what the platform has")
    platform, kind = target()
    if name is None:
        has_kernels = platform == "tpu" or (platform == "gpu" and any(hopper in kind for hopper in HOPPER))
        fits = has_kernels and not (misfit or limit(platform))
        return Kernels(family, platform if fits else "xla", interpret)  # type: ignore[arg-type]
    if name == "xla":
        return Kernels(family, name, False)
    if platform != name and not interpret:
        raise ValueError(
            f'implementation "{name}" needs a {name.upper()} and this is a {platform.upper()}; '
            f'use "xla", None for what the platform has, or interpret=True to run it step by step'
        )
    if misfit := misfit or limit(name):
        raise ValueError(f'{misfit}; implementation "xla" takes any size and float type')
    return Kernels(family, name, interpret)


def target() -> tuple[str, str]:
    """The platform that is compiled for and its device's name: those of the mesh in use, which may describe machines that are not here."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None) or jax.devices()[0]
    platform = getattr(device, "platform", None) or ("tpu" if "TPU" in device.device_kind else "gpu")
    return ("gpu" if platform == "cuda" else platform), device.device_kind


def misfit_of(x: jax.Array, width: int | None = None) -> str | None:
    """What about streams x, `width` columns each, the kernels cannot take. Without a width any will do."""
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"the arrays are {x.dtype}; the kernels take bfloat16 and float32"
    if width is not None and width % LANES:
        return f"C is {width}; the kernels need a multiple of {LANES}"
    if 0 in x.shape:
        return f"the array {x.shape} is empty"
    return None
