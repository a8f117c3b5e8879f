"""The TPU slices that a plan can be made for: their shapes, memory and interconnect. Clocks and HBM bandwidth are `static_cost.chips`'.

Sources. HBM capacity and interconnect bandwidth of a chip: the tables of Google Cloud's pages on v5e, v5p, v6e and TPU7x
(docs.cloud.google.com/tpu/docs/tpu7x compares the last three). The interconnect's bandwidth counts all links of a chip in both directions:
what one link carries one way is that over two and over its links, two an axis of the torus. Slices are those that the pages list. Which
axes close to a ring: those of a multiple of 4 chips on v5p and TPU7x (whole cubes of 4 x 4 x 4), those of 16 on v5e and v6e.
"""

from dataclasses import dataclass

from mhc_jax.errors import UserError
from pallas_kernels.static_cost import CHIPS, Chip

GIB = 2**30


@dataclass(frozen=True)
class Kind:
    """A generation of chips."""

    chip: Chip
    title: str
    devices_per_chip: int  # JAX devices
    hbm_bytes: int  # of one chip
    ici_bytes_per_second: float  # of one chip: all links, both directions
    ring: int  # an axis of a multiple of so many chips closes to a ring
    slices: tuple[str, ...]  # smallest first

    @property
    def axes(self) -> int:
        """Dimensions of the torus."""
        return self.slices[0].count("x") + 1

    @property
    def link_bytes_per_second(self) -> float:
        """Of one link in one direction."""
        return self.ici_bytes_per_second / 2 / (2 * self.axes)


FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("2x2x1", "2x2x2", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")

KINDS = {
    kind.chip.name: kind
    for kind in (
        Kind(CHIPS["v5e"], "TPU v5e", 1, 16 * GIB, 400e9, 16, FLAT),
        Kind(CHIPS["v5p"], "TPU v5p", 1, 95 * GIB, 1200e9, 4, CUBES),
        Kind(CHIPS["v6e"], "TPU v6e (Trillium)", 1, 32 * GIB, 800e9, 16, FLAT),
        Kind(CHIPS["tpu7x"], "TPU7x (Ironwood)", 2, 192 * GIB, 1200e9, 4, ("2x2x1", "2x2x2", "2x2x4", *CUBES[2:])),
    )
}


@dataclass(frozen=True)
class Machine:
    """What a table of plans says of the hardware."""

    name: str
    title: str  # of its chips
    chips: int
    devices: int
    hbm_bytes_per_device: int


@dataclass(frozen=True)
class Topology:
    """One slice."""

    kind: Kind
    shape: tuple[int, ...]  # chips along each axis of the torus

    @property
    def name(self) -> str:
        """As libtpu and the command line have it: "v5p:4x4x8"."""
        return f"{self.kind.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def devices(self) -> int:
        """JAX devices; on TPU7x two a chip."""
        return self.chips * self.kind.devices_per_chip

    @property
    def hbm_bytes_per_device(self) -> int:
        return self.kind.hbm_bytes // self.kind.devices_per_chip

    @property
    def machine(self) -> Machine:
        return Machine(self.name, self.kind.title, self.chips, self.devices, self.hbm_bytes_per_device)

    def closes(self, axis: int) -> bool:
        """Whether the chips along an axis form a ring."""
        return self.shape[axis] % self.kind.ring == 0


def parse(name: str) -> Topology:
    """The slice of this name, such as "v5p:4x4x8".

    Raises:
      UserError: there is no such slice; the message lists those of its generation, or all.
    """
    generation, _, shape = name.partition(":")
    if generation not in KINDS:
        raise UserError(f"there is no topology {name!r}; the known ones are\n{listing()}")
    kind = KINDS[generation]
    if shape not in kind.slices:
        raise UserError(f"there is no topology {name!r}; those of {kind.title} are {', '.join(f'{generation}:{s}' for s in kind.slices)}")
    return Topology(kind, tuple(map(int, shape.split("x"))))


def slices_of(kind: Kind) -> list[Topology]:
    """All slices of a generation, smallest first."""
    return [parse(f"{kind.chip.name}:{shape}") for shape in kind.slices]


def listing() -> str:
    """All slices, a line a generation."""
    return "\n".join(f"  {', '.join(f'{name}:{shape}' for shape in kind.slices)}" for name, kind in KINDS.items())
