"""A case: one kernel at one real shape, the unit that tests, benchmarks and the static cost engine share.

Each family lists its own in `pallas_kernels/FAMILY/cases.py`, in a function `cases() -> list[Case]`. No family is named here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Implementation = Literal["xla", "tpu", "gpu"]
Direction = Literal["forward", "backward"]
Program = tuple[Callable[..., Any], tuple[Any, ...]]


@dataclass(frozen=True)
class Case:
    """One kernel, in one direction, at one shape.

    `build(implementation)` returns `(fn, args)`: `fn(*args)` is what is compiled, costed and measured, under `jax.jit`, and `args` a tuple
    of pytrees of `jax.ShapeDtypeStruct` without shardings. Building allocates no array and asks for no device. Every implementation of a
    case takes the same `args` and returns the same shapes. A backward case takes what the forward saved and the cotangents, and returns the
    gradients: `fn` is the backward pass alone, not the gradient of both.

    `floor_bytes` is the fewest bytes that HBM must move on one device for one call: each input that `fn` needs read once, each output
    written once, nothing else. It is a bound from below of any implementation, so leave out whatever an implementation could do without.

    `floor_flops` is in the same way the fewest FLOPs (two for a multiplication and its addition) that the matrix units must do, at least.
    The floor's time is the larger of the bytes over the device's bandwidth and the FLOPs over its bfloat16 peak.
    """

    name: str  # the shape, unique within kernel and direction: "t8192_n4_c2560"
    kernel: str  # the public function: "mhc_post_pre"
    direction: Direction
    build: Callable[[Implementation], Program]
    floor_bytes: int
    floor_note: str  # how the floor counts, in a reader's terms: "X and y read, X' and u written: (2n + 2) C 2 bytes a token"
    floor_flops: int = 0
    # Replaces shapes in `args` by arrays, for those whose values decide what is done, such as lists of indices. Only measuring asks for it.
    values: Callable[[tuple[Any, ...]], tuple[Any, ...]] = lambda args: args
    # What kernels do only where the data is unusual: "a tile with anything not finite is mixed again". The modelled time then leaves
    # out code under conditions on data, and says so; by default it is charged as if such conditions always held.
    rare: str = ""
    # Why no schedule tells what it costs: "how long the walk is, is data". It is measured where it can be, and not modelled.
    unscheduled: str = ""
    # The same work done by other libraries, by the name of their package, with arguments of their own: compared with where installed.
    peers: Mapping[str, Callable[[], Program]] = field(default_factory=dict)
    # Makes a function that does the same work in PyTorch on the GPU that is here, to be timed beside it.
    pytorch: Callable[[], Callable[[], Any]] | None = None

    def __post_init__(self) -> None:
        if self.direction not in ("forward", "backward"):
            raise ValueError(f"case {self.name!r}: direction is {self.direction!r}; it must be 'forward' or 'backward'")
        if self.floor_bytes <= 0:
            raise ValueError(
                f"case {self.name!r}: floor_bytes is {self.floor_bytes}; it must be the positive number of bytes HBM has to move"
            )
        if self.floor_flops < 0:
            raise ValueError(f"case {self.name!r}: floor_flops is {self.floor_flops}; it must be the number of FLOPs to do, or 0")
        if not self.floor_note:
            raise ValueError(f"case {self.name!r}: floor_note is empty; say what floor_bytes counts")

    @property
    def label(self) -> str:
        """What a person types to name it: KERNEL/DIRECTION/NAME."""
        return f"{self.kernel}/{self.direction}/{self.name}"
