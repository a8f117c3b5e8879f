"""The kernels can be taken without the rest: importing them needs JAX and numpy and nothing else."""

import ast
import sys
from pathlib import Path

import pallas_kernels

FOLDER = Path(pallas_kernels.__file__).parent


def test_the_package_imports_jax_and_numpy_alone():
    allowed = {"jax", "numpy", "pallas_kernels"} | sys.stdlib_module_names
    for path in FOLDER.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.partition(".")[0] in allowed, f"{path} imports {name}"
