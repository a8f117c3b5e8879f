"""Records what the compiler dumps for some programs, for tests that run without it: python tests/pallas_kernels/static_cost/record.py

Comments that only repeat what DMAs copy are left out: they are most of the text.
"""

import re
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import cost_programs as programs

from pallas_kernels.static_cost import cost

FOLDER = Path(__file__).parent / "recorded"
RECORDED = {
    "copy_v6e": (programs.copy_small, "v6e:2x2"),
    "copy_tpu7x": (partial(programs.copy_large, rows=64), "tpu7x:2x2x1"),
    "copy_parallel_v5p": (partial(programs.copy_small, "parallel"), "v5p:2x2x1"),
    "loop_v6e": (partial(programs.loop, 100), "v6e:2x2"),
    "dynamic_loop_v6e": (programs.dynamic_loop, "v6e:2x2"),
    "data_condition_v6e": (programs.data_condition, "v6e:2x2"),
    "sum_blocks_v6e": (programs.sum_blocks, "v6e:2x2"),
}


def record(name: str) -> None:
    """Writes one listing."""
    build, topology = RECORDED[name]
    with TemporaryDirectory() as folder:
        cost(build, 1, topology, keep=Path(folder))
        found = [path for path in Path(folder).iterdir() if re.search(r"-\d+-packed-bundles-post-ra", path.name)]
        (listing,) = [path for path in found if not re.search(r"<|TLP|schedule-analysis", path.name)]
        text = listing.read_text()
    text = re.sub(
        r"^(base|dynamic_base|window|iteration)_bounds:.*\n|^(strides|pad_low|pad_high|element_size_in_bytes):.*\n", "", text, flags=re.M
    )
    text = re.sub(r"/\* (input|output) window allocation[^*]*\*/", "", text)
    (FOLDER / f"{name}.txt").write_text(text)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in RECORDED:
        record(name)
