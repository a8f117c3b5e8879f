"""Which mesh axes a logical axis is split over: one frozen dataclass, read by everything that places an array."""

import dataclasses
from dataclasses import dataclass

from jax.sharding import PartitionSpec

MeshAxes = str | tuple[str, ...] | None


@dataclass(frozen=True)
class Rules:
    """A logical axis a field; its value is the mesh axis or axes that it is split over, None where every device holds all of it."""

    batch: MeshAxes = ("data", "fsdp", "expert")  # sequences of a batch
    sequence: MeshAxes = ("context", "tensor")  # positions, between sublayers: streams, and all that is done token by token
    positions: MeshAxes = "context"  # positions, inside sublayers that split heads, hidden widths or vocabulary
    tokens: MeshAxes = ("data", "fsdp", "expert", "context", "tensor")  # batch and sequence as one axis, each device's own tokens together
    heads: MeshAxes = "tensor"
    all_heads: MeshAxes = ("tensor", "context")  # heads where every device sees whole sequences
    hidden: MeshAxes = "tensor"  # of feed-forwards that every token visits
    experts: MeshAxes = ("expert", "tensor")
    vocab: MeshAxes = "tensor"
    embed: MeshAxes = "fsdp"  # C of parameters
    expert_hidden: MeshAxes = "fsdp"  # F of experts' second matrices, in the place of C: rows may be few, columns fill a TPU's 128 lanes
    stream_embed: MeshAxes = "fsdp"  # n * C of connection parameters
    rank: MeshAxes = "fsdp"  # of the latents that queries, keys and values are expanded from; whole where it does not come out even
    layers: MeshAxes = None
    table_rows: MeshAxes = ("data", "fsdp", "expert", "context", "tensor")  # of Engram's tables: a device owns a contiguous block

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
            for name in self.mesh_axes(axis):
                if name in owner:
                    raise ValueError(f"logical axes {owner[name]!r} and {axis!r} of one array are both split over mesh axis {name!r}")
                owner[name] = axis
            entries.append(getattr(self, axis))
        return PartitionSpec(*entries)

    def mesh_axes(self, axis: str) -> tuple[str, ...]:
        """Names of the mesh axes that a logical axis is split over, the outermost first."""
        axes: MeshAxes = getattr(self, axis)
        return (axes,) if isinstance(axes, str) else axes or ()
