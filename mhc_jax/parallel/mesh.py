"""The mesh that a config asks for, and placing arrays on it. One device is a mesh of one."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding

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
    devices = jax.devices() if devices is None else devices
    wanted, present = config.devices, len(devices)
    if wanted > present:
        asked = {name: size for name, size in sizes.items() if size > 1}
        raise UserError(
            f"{' x '.join(f'mesh.{name}' for name in asked)} = {' x '.join(map(str, asked.values()))} asks for {wanted} devices, but "
            f"{present} are present; lower them, or on a CPU set JAX_NUM_CPU_DEVICES={wanted}"
        )
    if idle := {device.process_index for device in devices} - {device.process_index for device in devices[:wanted]}:
        raise UserError(
            f"the mesh has {wanted} of {present} devices, which leaves process {', '.join(map(str, sorted(idle)))} without any; raise "
            "mesh.data or mesh.fsdp, or start fewer processes"
        )
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices[:wanted])


def shardings(mesh: Mesh, rules: Rules, specs: Any) -> Any:
    """The sharding of every parameter, from a pytree of `mhc_jax.nn.module.Spec`."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, rules.spec(*spec.axes)), specs)
