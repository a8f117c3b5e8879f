"""Which mesh axes a logical axis is split over: one frozen dataclass, read by everything that places an array."""

import dataclasses
from dataclasses import dataclass

from jax.sharding import PartitionSpec

MeshAxes = str | tuple[str, ...] | None


@dataclass(frozen=True)
class Rules:
    """A logical axis a field; its value is the mesh axis or axes that it is split over, None where every device holds all of it."""

    batch: MeshAxes = ("data", "fsdp")  # sequences of a batch, and tokens where batch and sequence are one axis
    embed: MeshAxes = "fsdp"  # C of parameters
    stream_embed: MeshAxes = "fsdp"  # n * C of connection parameters
    heads: MeshAxes = None
    hidden: MeshAxes = None  # of feed-forwards
    experts: MeshAxes = None
    vocab: MeshAxes = None
    layers: MeshAxes = None
    table_rows: MeshAxes = ("data", "fsdp")  # of Engram's tables: a device owns a contiguous block

    def spec(self, *axes: str | None) -> PartitionSpec:
        """The partition of an array whose axes have these logical names (None: not split).

        Raises:
          ValueError: two axes of the array would be split over the same mesh axis; both are named.
        """
        owner: dict[str, str] = {}
        known = {f.name for f in dataclasses.fields(self)}
        entries: list[MeshAxes] = []
        for axis in axes:
            if axis is None:
                entries.append(None)
                continue
            if axis not in known:
                raise ValueError(f"no sharding rule for logical axis {axis!r}; the rules are {', '.join(sorted(known))}")
            mesh_axes: MeshAxes = getattr(self, axis)
            for name in (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ():
                if name in owner:
                    raise ValueError(f"logical axes {owner[name]!r} and {axis!r} of one array are both split over mesh axis {name!r}")
                owner[name] = axis
            entries.append(mesh_axes)
        return PartitionSpec(*entries)
