"""The mesh that a config asks for, and placing arrays on it. One device is a mesh of one."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from mhc_jax.config import MeshConfig
from mhc_jax.errors import UserError
from mhc_jax.parallel.rules import Rules


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with an axis for each field of the config over the first devices of this run, or of those given.

    Neighbours on the last axis, `tensor`, exchange most and lie next to each other.

    Raises:
      UserError: the config asks for more devices than there are, or for so few that a process has none.
    """
    sizes = dataclasses.asdict(config)
    own = devices is None
    devices = jax.devices() if devices is None else devices
    wanted, present = config.devices, len(devices)
    if wanted > present:
        asked = {name: size for name, size in sizes.items() if size > 1}
        raise UserError(
            f"{' x '.join(f'mesh.{name}' for name in asked)} = {' x '.join(map(str, asked.values()))} asks for {wanted} devices, but "
            f"{present} are present; lower them, or on a CPU set JAX_NUM_CPU_DEVICES={wanted}"
        )
    idle = {device.process_index for device in devices} - {device.process_index for device in devices[:wanted]}
    if own and idle:
        raise UserError(
            f"the mesh has {wanted} of {present} devices, which leaves process {', '.join(map(str, sorted(idle)))} without any; raise "
            "mesh.data or mesh.fsdp, or start fewer processes"
        )
    shape, names, kinds = tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes)
    try:
        return jax.make_mesh(shape, names, axis_types=kinds, devices=devices[:wanted])
    except NotImplementedError:  # no axis of the mesh is a product of whole axes of the TPU's torus: they are split
        return Mesh(create_device_mesh(shape, devices[:wanted], allow_split_physical_axes=True), names, axis_types=kinds)


def shardings(mesh: Mesh, rules: Rules, specs: Any, model: Any) -> Any:
    """The sharding of every parameter of a model, from a pytree of `mhc_jax.nn.module.Spec` of its structure."""
    return jax.tree.map(lambda spec, parameter: NamedSharding(mesh, partition(mesh, rules, spec, parameter.shape)), specs, model)


def partition(mesh: Mesh | AbstractMesh, rules: Rules, spec: Any, shape: tuple[int, ...]) -> PartitionSpec:
    """How a parameter of this `mhc_jax.nn.module.Spec` and shape is split.

    A latent's dimensions are split only where they come out even: it is the parts that are small which have few of them.
    """
    parts = math.prod(mesh.shape[name] for name in rules.mesh_axes("rank"))
    uneven = [axis == "rank" and size % parts for axis, size in zip(spec.axes, shape, strict=True)]
    return rules.spec(*(None if odd else axis for axis, odd in zip(spec.axes, uneven)))
