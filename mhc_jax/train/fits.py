"""Whether a run can fit into memory at all, by a bound that needs no compiler. The exact need is the compiler's to tell (loop)."""

import os
from pathlib import Path

import jax
from jax.sharding import Mesh

from mhc_jax.config import Config
from mhc_jax.errors import UserError
from mhc_jax.nn.count import count_parameters

PARAMETER_BYTES = {"float32": 16, "bfloat16": 12}  # parameter and gradient in float32, and two moments
TABLE_BYTES = {"adam": 12, "row_second_moment": 4, "sinkhorn": 8}  # of an entry of a table: itself and its moments; no gradient
TOKEN_BYTES = 16  # the four int32 arrays of a batch
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def check_fits(config: Config, mesh: Mesh) -> None:
    """Refuses a config whose parameters, optimizer state and residual streams alone exceed the memory of this process's devices.

    What passes may still be too large: activations inside layers are not counted.

    Raises:
      UserError: names the bytes needed and the bytes there are.
    """
    devices = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    needed, each = bytes_needed(config), device_bytes(devices[0])
    if devices[0].platform == "cpu":  # they share the host's memory
        where, needed, available = f"this machine's {len(devices)} CPU device(s)", needed * len(devices) + host_bytes_needed(config), each
    else:
        where, available = f"each {devices[0].device_kind}", each
    if available is not None and needed > available:
        raise UserError(
            f"{config.name} needs at least {_gib(needed)} for parameters, gradients, optimizer state, batch and residual streams on "
            f"{where}, which has {_gib(available)}; raise mesh.fsdp or mesh.expert to use more devices, or lower "
            "model.num_layers, model.dim, model.moe.num_experts, data.seq_len or train.batch_size / train.microbatches"
        )
    on_machine = machine_bytes()
    if on_machine is not None and host_bytes_needed(config) > on_machine:
        raise UserError(
            f"{config.name} needs at least {_gib(host_bytes_needed(config))} for its tables in host memory, and this machine has "
            f'{_gib(on_machine)}; lower model.engram.table_sizes, heads or head_dim, or set model.engram.tables.placement to "device"'
        )


def bytes_needed(config: Config) -> int:
    """The least that one device must hold: its share of parameters, gradients and moments, of the batch, and one copy of the streams."""
    m = config.model
    shards = config.mesh.devices
    tokens = config.tokens_per_step // shards
    streams = 1 if m.residual == "residual" else m.connections.streams
    stream_bytes = tokens // config.train.microbatches * streams * m.dim * (2 if m.dtype == "bfloat16" else 4)
    count, of_tables = count_parameters(m), 0
    if m.engram is not None:
        own = m.engram.tables
        entries = len(m.engram.layers) * own.hot_rows * m.engram.head_dim if own.placement == "host" else count.table
        of_tables = entries * TABLE_BYTES[own.optimizer] // shards
    split = config.mesh.fsdp * config.mesh.expert * config.mesh.tensor  # at most: vectors and, over `expert`, all but experts are whole
    of_network = (count.total - count.table) * PARAMETER_BYTES[config.optimizer.moments] // split
    return of_network + of_tables + tokens * TOKEN_BYTES + stream_bytes


def host_bytes_needed(config: Config) -> int:
    """What tables in host memory and their moments take; a checkpoint that is being written, as much again."""
    engram = config.model.engram
    if engram is None or engram.tables.placement == "device":
        return 0
    return count_parameters(config.model).table * TABLE_BYTES[engram.tables.optimizer]


def device_bytes(device: jax.Device) -> int | None:
    """Memory of a device in bytes, for a CPU that of the host within its container; None where it is not told."""
    return machine_bytes() if device.platform == "cpu" else (device.memory_stats() or {}).get("bytes_limit")


def machine_bytes() -> int | None:
    """Host memory in bytes, within the container that this runs in; None where it is not told."""
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    limits = [path.read_text().strip() for path in CGROUP_LIMITS if path.exists()]
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *(int(limit) for limit in limits if limit.isdigit())])


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"
