"""Compiling and lowering for accelerators that this machine does not have. No costs: `model` has those."""

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels.static_cost.chips import chip_of

# What libtpu would otherwise ask the cloud's metadata server, and several processes may load it at once. It reads these when it loads.
TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v6e-4",
    "TPU_STDERR_LOG_LEVEL": "3",
}

# A GPU target: the device's name in JAX, streaming multiprocessors, compute capability, memory, its bandwidth, second-level cache, clock;
# all NVIDIA's published figures. What else XLA's GpuTargetConfig asks for belongs to the compute capability.
GPUS = {
    "H100": ("NVIDIA H100 80GB HBM3", 132, 9, 80 << 30, 3_350_000_000_000, 50 << 20, 1.98),
    "H200": ("NVIDIA H200", 132, 9, 141 << 30, 4_800_000_000_000, 50 << 20, 1.98),
    "B200": ("NVIDIA B200", 148, 10, 180 << 30, 8_000_000_000_000, 126 << 20, 1.965),
}


def compile_for(topology: str, fn: Callable[..., Any], args: tuple[Any, ...]) -> jax.stages.Compiled:
    """Compiles `fn` ahead of time for a TPU topology ("v6e:2x2") or a GPU ("H100", "H200", "B200") that is not present.

    Args:
      topology: the target. TPUs need libtpu (`pip install libtpu`), GPUs the CUDA plugin's two wheels, neither a device nor a driver.
      fn: traced under the target's abstract mesh, so code that asks what chip it is on gets the target's answer.
      args: pytrees of `jax.ShapeDtypeStruct`. Those whose sharding names an `AbstractMesh` are laid out over that many devices of the
        target; the others are replicated. Without any such sharding one device is used.

    Raises ValueError for a target that is not known or whose compiler is not installed, and whatever the compiler raises.
    """
    mesh = device_mesh(topology, args)
    args = jax.tree.map(lambda arg: _on(mesh, arg), args)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(fn).lower(*args).compile()


def lower_for(topology: str, fn: Callable[..., Any], args: tuple[Any, ...]) -> jax.stages.Lowered:
    """Lowers `fn` for a target of `compile_for` on one device. Needs no compiler, takes a fraction of a second and finds less.

    It finds what JAX itself rejects: block shapes, primitives without a lowering, and Mosaic GPU's shared-memory limits.
    """
    if topology in GPUS:
        kind, cores, platform, lowering = GPUS[topology][0], GPUS[topology][1], "gpu", "cuda"
    else:
        chip = chip_of(topology)
        kind, cores, platform, lowering = chip.device_kind, chip.cores, "tpu", "tpu"
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=cores, platform=platform)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)):
        return jax.jit(fn).trace(*args).lower(lowering_platforms=(lowering,))


def device_mesh(topology: str, args: tuple[Any, ...]) -> Mesh:
    """A mesh of the target's devices: as the abstract mesh in the shardings of `args` says, or of one device."""
    devices = np.array(target_devices(topology))
    meshes = {leaf.sharding.mesh for leaf in jax.tree.leaves(args) if isinstance(leaf.sharding, NamedSharding)}
    if len(meshes) > 1:
        raise ValueError(f"the arguments name {len(meshes)} meshes; they must share one")
    if not meshes:
        return Mesh(devices[:1], ("x",), axis_types=(AxisType.Auto,))
    (mesh,) = meshes
    if mesh.size > len(devices):
        raise ValueError(f"the arguments are laid out over {mesh.size} devices; {topology} has {len(devices)}")
    return Mesh(devices[: mesh.size].reshape(mesh.axis_sizes), mesh.axis_names, axis_types=mesh.axis_types)


def target_devices(topology: str) -> list[Any]:
    """The devices of a target of `compile_for`, which may not be here; of a GPU the eight of one machine.

    Raises ValueError for a target that is not known or whose compiler is not installed.
    """
    return _gpu_devices(topology) if topology in GPUS else _tpu_devices(topology)


def _on(mesh: Mesh, arg: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    spec = arg.sharding.spec if isinstance(arg.sharding, NamedSharding) else PartitionSpec()
    return jax.ShapeDtypeStruct(arg.shape, arg.dtype, sharding=NamedSharding(mesh, spec))


def check_libtpu() -> None:
    """ValueError with what to install where libtpu, the TPU compiler, is missing."""
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"compiling for a TPU needs its compiler, libtpu, and no TPU: pip install 'mhc-jax[tpu]' "
            f"installs the version that belongs to jax {jax.__version__} (Linux on x86-64)"
        )


def _tpu_devices(topology: str) -> list[Any]:
    chip_of(topology)
    check_libtpu()
    for name, value in TPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def _gpu_devices(name: str) -> list[Any]:
    kind, multiprocessors, capability, memory, bandwidth, cache, clock = GPUS[name]
    if importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
        raise ValueError(
            f"compiling for {name} needs JAX's CUDA plugin, and no GPU: "
            f"pip install jax-cuda13-plugin=={jax.__version__} jax-cuda13-pjrt=={jax.__version__}"
        )
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # cuDNN is not needed to compile
    jax.devices()  # the plugin registers itself with the backends
    config = f"""gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
      shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      core_count: {multiprocessors} fpus_per_core: 128 clock_rate_ghz: {clock}
      device_memory_size: {memory} memory_bandwidth: {bandwidth} l2_cache_size: {cache}
      cuda_compute_capability {{ major: {capability} minor: 0 feature_extension: ACCELERATED_FEATURES }}
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 8 }}
    device_description_str: "{kind}"
    """
    try:
        return topologies.get_topology_desc(platform="cuda", topology_name=name.lower(), topology="1x1x8", target_config=config).devices
    except NotImplementedError:  # the plugin looked for cuDNN when JAX's backends started, before the variable above was set
        raise ValueError(
            f"compiling for {name} without a GPU needs JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 in the environment before JAX starts"
        ) from None
