"""FLOPs of the matrix products in a compiled module, read from the shapes of its instructions. A multiplication with its addition is two.

A TPU compiler writes products as convolutions, batched ones with the batch as a dilated window in which one position in `size` meets data;
those that meet padding are not counted. Pallas kernels hold no such instructions: their FLOPs are not told here, but for grouped products.
"""

import re
from dataclasses import dataclass
from math import ceil, prod

from mhc_jax.nn.expert_parallel import FIRST_ROUND, ROOM
from mhc_jax.plan.parts import op_name
from pallas_kernels.grouped.tpu.visits import row_tile
from pallas_kernels.static_cost.hlo import ARRAY, Instruction, Module

FLOATS = {"bf16": 2, "f16": 2, "f32": 4}  # bytes

LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
WINDOW = re.compile(r"window=\{([^}]*)\}")


def dims(shape: str) -> list[tuple[str, tuple[int, ...], str]]:
    """Type, dimensions and layout of each array of a shape."""
    return [(m[1], tuple(int(n) for n in m[2].split(",") if n), m[3] or "") for m in ARRAY.finditer(shape)]


def flops_of(step: Instruction, computation: str, module: Module) -> int:
    """Of one run of an instruction and of what it fuses; 0 for what is no product."""
    if step.opcode == "fusion":
        return sum(flops_of(inner, name, module) for name in step.called("calls") for inner in module.computations.get(name, ()))
    if step.opcode == "convolution":
        return _convolution(step, computation, module)
    if step.opcode == "dot":
        left = _dims_of(step.operands[0], computation, module)
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", step.attributes)
        width = prod(left[int(n)] for n in contracted[1].split(",") if n) if contracted else 1
        return 2 * prod(dims(step.shape)[0][1]) * width
    return 0


def _convolution(step: Instruction, computation: str, module: Module) -> int:
    labels = LABELS.search(step.attributes)
    if not labels:
        return 0
    of_input, of_kernel, of_output = labels.groups()
    image, kernel = (_dims_of(name, computation, module) for name in step.operands[:2])
    output = dims(step.shape)[0][1]
    window = {
        key: value.split("x") for key, _, value in (part.partition("=") for part in (WINDOW.search(step.attributes) or ["", ""])[1].split())
    }
    positions = 1
    for place, label in enumerate(sorted(label for label in of_kernel if label.isdigit())):
        positions *= _met(
            image[of_input.index(label)],
            kernel[of_kernel.index(label)],
            output[of_output.index(label)],
            stride=int(window["stride"][place]) if "stride" in window else 1,
            low=int(window["pad"][place].split("_")[0]) if "pad" in window else 0,
            dilation=int(window["lhs_dilate"][place]) if "lhs_dilate" in window else 1,
            spread=int(window["rhs_dilate"][place]) if "rhs_dilate" in window else 1,
        )
    groups = re.search(r"batch_group_count=(\d+)", step.attributes)
    batch = output[of_output.index("b")]
    return 2 * batch * output[of_output.index("f")] * kernel[of_kernel.index("i")] * positions // (int(groups[1]) if groups else 1)


def _met(image: int, kernel: int, output: int, *, stride: int, low: int, dilation: int, spread: int) -> int:
    """Pairs of an output and a kernel position of one window dimension that meet an input, neither padding nor a hole of dilation."""
    end = (image - 1) * dilation
    places = (o * stride + k * spread - low for o in range(output) for k in range(kernel))
    return sum(1 for place in places if 0 <= place <= end and place % dilation == 0)


def _dims_of(name: str, computation: str, module: Module) -> tuple[int, ...]:
    made = module.instructions[computation].get(name)
    return dims(made.shape)[0][1] if made else ()


@dataclass(frozen=True)
class Grouped:
    """A product of rows sorted by expert."""

    flops: int  # of its rows
    done: int  # of its tiles
    bytes: int  # that its tiles move


def grouped_product(step: Instruction, computation: str, module: Module) -> Grouped | None:
    """What a kernel of `pallas_kernels.grouped`, or libtpu's own for a ragged product, does at most; None for anything else.

    How many rows each expert gets is data. What even routing leaves free of the room for an exchange is not visited. The
    most tiles that a grid visits are those of all rows and one more for every expert, where a
    tile holds rows of two. Every tile reads its rows again for each block of columns; matrices and results move once, in libtpu's kernel a
    block of the matrix with every tile.
    """
    ours = re.search(r"[/(](grouped_matmul|grouped_outer)\)*/", step.attributes)
    theirs = re.search(r'ragged_dot_tiling="(\d+),(\d+),(\d+)"', step.attributes)
    if not ours and not theirs:
        return None
    made = [module.instructions[computation].get(name) for name in step.operands]
    given = [array for own in made if own for array in dims(own.shape)[:1] if array[0] in FLOATS and len(array[1]) >= 2]
    if len(given) < 2:
        return None
    (kind, rows, _), (_, other, _) = given[-2:]
    result = dims(step.shape)[0][1]
    size = FLOATS[kind]
    count, width = rows
    if FIRST_ROUND in op_name(step):
        count = ceil(count / ROOM)
    if ours and ours[1] == "grouped_outer":
        out, experts = other[1], result[0]
    else:
        out, experts = result[1], other[0]
    flops = 2 * count * width * out
    if theirs:
        tile, of_width, of_out = map(int, theirs.groups())
        steps = (ceil(count / tile) + experts - 1) * ceil(width / of_width) * ceil(out / of_out)
        moved = steps * (tile * of_width + of_width * of_out) * size + count * out * size
        return Grouped(flops, 2 * steps * tile * of_width * of_out, moved)
    tile = row_tile(rows[0])
    tiles = count // tile + experts
    # Blocks are as large as VMEM allows; a handful of them is what the shapes of large models give.
    moved = (
        4 * tiles * tile * (width if ours and ours[1] == "grouped_matmul" else width + out) + prod(result) + experts * width * out
    ) * size
    return Grouped(flops, 2 * tiles * tile * width * out, moved)
