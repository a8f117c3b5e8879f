"""Collectives of a compiled module: what they move between which devices, and how long that takes on a torus of chips.

The devices of a group span some axes of the torus. An axis that closes to a ring and is spanned in full gives two links, any other one. All
spanned axes carry at once; the devices of a chip share its links evenly. Where both are in the group, what is gathered or summed crosses
the links once for both: the compiler lays its rings over chips of TPU7x, with "partner transfers outside the ring" between the two devices
of one. Their interface is six times as fast as a link (docs.cloud.google.com/tpu/docs/tpu7x), and is not counted.
With g devices or chips, and W bytes a second over those links for one:

    all-gather, reduce-scatter   (g - 1) / g of the whole array over W
    all-reduce                   both, one after the other
    all-to-all                   the longest axis spanned, times what a device sends, over 4 W of that axis: a ring's mean way is a quarter
    permute                      what a device sends, over one link
    and 1 us for every hop to the farthest device, half of each spanned axis where it is a ring

Collectives run one after the other, each with the links to itself. The compiler chooses among several algorithms; none is modelled. The
figures of links stand in `topologies`.
"""

import re
from dataclasses import dataclass

import numpy as np

from mhc_jax.plan.topologies import Topology
from pallas_kernels.static_cost.hlo import Instruction, Module

HOP_SECONDS = 1e-6
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "permute")
OPCODES = {
    "all-gather": "all-gather",
    "all-reduce": "all-reduce",
    "reduce-scatter": "reduce-scatter",
    "all-to-all": "all-to-all",
    "ragged-all-to-all": "all-to-all",
    "collective-permute": "permute",
}
MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\]\s*(?:\{([^}]*)\})?")
IOTA_GROUPS = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
LISTED_GROUPS = re.compile(r"replica_groups=\{\{([\d,]*)\}")
PAIRS = re.compile(r"source_target_pairs=\{\{(\d+),(\d+)\}")


@dataclass(frozen=True)
class Collective:
    """One collective instruction, for one device and one run of it."""

    kind: str  # of KINDS
    bytes: int  # that the device receives from others
    seconds: float


def collective_in(step: Instruction, module: Module) -> Instruction | None:
    """The collective that an instruction is, or that the computation it calls holds; None if there is none."""
    if _kind(step.opcode):
        return step
    if step.opcode in ("fusion", "async-start", "custom-call", "call-start"):
        for name in step.called("to_apply" if step.opcode == "call-start" else "calls"):
            for inner in module.computations.get(name, ()):
                if _kind(inner.opcode):
                    return inner
    return None


def _kind(opcode: str) -> str | None:
    return OPCODES.get(opcode.removesuffix("-start"))


def is_reduce_scatter(step: Instruction, module: Module) -> bool:
    """Whether an all-reduce is one whose computation keeps only the device's own slice: what TPUs make of a reduce-scatter."""
    calls = step.called("calls") if step.opcode == "fusion" else []
    return any("all-reduce-scatter" in name for name in calls)


def cost_of(
    found: Instruction, outer: Instruction, module: Module, topology: Topology, coordinates: tuple[tuple[int, ...], ...]
) -> Collective:
    """What a collective moves and how long that takes. `outer` is the instruction that stands in the schedule.

    Args:
      found: of `collective_in`.
      outer: the instruction that holds it, or it itself.
      module: the module they are in.
      topology: whose links are used.
      coordinates: of the chip of each partition.
    """
    kind = _kind(found.opcode) or ""
    if kind == "all-reduce" and is_reduce_scatter(outer, module):
        kind = "reduce-scatter"
    sizes = [size for size, _ in found.arrays]
    whole = sizes[-1] if found.opcode.endswith("-start") and kind in ("all-gather", "permute") else sum(sizes)
    if found.opcode.startswith("ragged"):  # into or out of a room that is larger than what travels where experts are visited alike
        here = next(steps for steps in module.instructions.values() if found.name in steps)
        whole = min(whole, sum(size for size, _ in here[found.operands[0]].arrays))
    group = group_of(found.attributes, len(coordinates))
    count = len(group)
    if kind == "reduce-scatter" and found.opcode.startswith("reduce-scatter"):
        whole *= count
    if count < 2:
        return Collective(kind, 0, 0.0)
    links, hops, longest = span_of(group, topology, coordinates)
    rate = links * topology.kind.link_bytes_per_second / topology.kind.devices_per_chip
    latency = hops * HOP_SECONDS
    moved = whole * (count - 1) // count
    chips = len({coordinates[device][: len(topology.shape)] for device in group})
    crossing = whole * (chips - 1) / count  # a device's share of what its chip receives
    if kind == "permute":
        return Collective(kind, whole, whole / (rate / links) + HOP_SECONDS)
    if kind == "all-to-all":
        per_axis = rate / max(1, sum(1 for _ in longest))
        return Collective(kind, moved, max(longest, default=1) * whole / (4 * per_axis) + latency)
    times = 2 if kind == "all-reduce" else 1
    return Collective(kind, times * moved, times * (crossing / rate + latency))


def group_of(attributes: str, partitions: int) -> list[int]:
    """The devices of one group of a collective: the first one, as every group has the same form."""
    if found := MESH_GROUPS.search(attributes):
        axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        over = re.findall(r"'([^']+)'", found[2] or "") or list(axes)
        numbers = np.arange(int(np.prod(list(axes.values())))).reshape(tuple(axes.values()))
        if devices := re.search(r"device_ids=\(([\d,]+)\)", found[0]):
            numbers = np.array([int(number) for number in devices[1].split(",")]).reshape(numbers.shape)
        return [int(n) for n in numbers[tuple(slice(None) if name in over else 0 for name in axes)].reshape(-1)]
    if found := IOTA_GROUPS.search(attributes):
        shape, dims = ([int(n) for n in found[i].split(",")] for i in (1, 2))
        numbers = np.arange(int(np.prod(dims))).reshape(dims)
        if found[3]:
            numbers = numbers.transpose([int(n) for n in found[3].split(",")])
        return [int(n) for n in numbers.reshape(shape)[0]]
    if found := LISTED_GROUPS.search(attributes):
        return [int(n) for n in found[1].split(",") if n] or list(range(partitions))
    if found := PAIRS.search(attributes):
        return [int(found[1]), int(found[2])]
    return list(range(partitions))


def span_of(group: list[int], topology: Topology, coordinates: tuple[tuple[int, ...], ...]) -> tuple[int, int, list[int]]:
    """Links of a chip that a group uses, hops to its farthest chip, and the chips along each axis that it spans."""
    chips = np.array([coordinates[device][: len(topology.shape)] for device in group])
    links, hops, spanned = 0, 0, []
    for axis, size in enumerate(topology.shape):
        count = len(np.unique(chips[:, axis]))
        if count < 2:
            continue
        ring = count == size and topology.closes(axis)
        links += 2 if ring else 1
        hops += count // 2 if ring else count - 1
        spanned.append(count)
    return max(links, 1), max(hops, 1), spanned
