"""FLOPs of the matrix products in a compiled module, read from the shapes of its instructions. A multiplication with its addition is two.

A TPU compiler writes products as convolutions, batched ones with the batch as a dilated window in which one position in `size` meets data; those
that meet padding are not counted. Pallas kernels hold no such instructions: their FLOPs are not told here, but for libtpu's ragged products.
"""

import re
from math import ceil, prod

from pallas_kernels.static_cost.hlo import ARRAY, ELEMENT_BITS, Instruction, Module

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


def ragged_product(step: Instruction, computation: str, module: Module) -> tuple[int, int, int] | None:
    """(FLOPs, FLOPs that its tiles do, bytes that its tiles move) of a product of libtpu's own ragged kernel, None for anything else.

    Its grid depends on how many rows each expert got, which only data says. Counted is the most that it can be: rows / tile of full tiles, and
    one more for every expert but one, where a tile holds rows of two. A step loads a tile of each operand; results are written once.
    """
    tiling = re.search(r'ragged_dot_tiling="(\d+),(\d+),(\d+)"', step.attributes)
    if not tiling:
        return None
    given = [module.instructions[computation].get(name) for name in step.operands]
    arrays = [dims(made.shape)[0] for made in given if made and dims(made.shape)]
    wide = [array for array in arrays if array[0] in ("bf16", "f32", "f16", "f8e4m3fn") and len(array[1]) >= 2]
    if len(wide) < 2:
        return None
    (kind, rows, _), (_, weights, _) = wide[-2:]
    tm, tk, tn = map(int, tiling.groups())
    output = dims(step.shape)[0][1]
    count, width, out = rows[0], rows[1], output[-1]
    experts = weights[0] if len(weights) == 3 else 1
    tiles = ceil(count / tm) + experts - 1
    size = ELEMENT_BITS.get(kind, int(re.sub(r"\D", "", kind[:4]) or 16)) // 8
    steps = tiles * ceil(width / tk) * ceil(out / tn)
    moved = steps * (tm * tk + tk * tn) * size + count * out * size
    return 2 * count * width * out, 2 * steps * tm * tk * tn, moved
