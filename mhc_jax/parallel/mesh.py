"""The mesh that a config asks for, and placing arrays on it. One device is a mesh of one."""

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding

from mhc_jax.config import MeshConfig
from mhc_jax.errors import UserError
from mhc_jax.parallel.rules import Rules


def make_mesh(config: MeshConfig) -> Mesh:
    """A mesh with axes `data` and `fsdp` over the first devices.

    Raises:
      UserError: the config asks for more devices than there are.
    """
    wanted, present = config.data * config.fsdp, jax.device_count()
    if wanted > present:
        raise UserError(
            f"mesh.data x mesh.fsdp = {config.data} x {config.fsdp} asks for {wanted} devices, but {present} are present; lower them, "
            f"or on a CPU set JAX_NUM_CPU_DEVICES={wanted}"
        )
    return jax.make_mesh((config.data, config.fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:wanted])


def shardings(mesh: Mesh, rules: Rules, specs: Any) -> Any:
    """The sharding of every parameter, from a pytree of `mhc_jax.nn.module.Spec`."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, rules.spec(*spec.axes)), specs)
