"""Finds the kernel families of this package and their cases. It knows no family by name: one is a subpackage with a `cases` module."""

import importlib
import pkgutil
from typing import cast

import pallas_kernels
from pallas_kernels.case import Case, Implementation, Program


def families() -> dict[str, list[Case]]:
    """The cases of every family, by the family's name."""
    found = {}
    for package in pkgutil.iter_modules(pallas_kernels.__path__):
        names = {module.name for module in pkgutil.iter_modules([f"{path}/{package.name}" for path in pallas_kernels.__path__])}
        if package.ispkg and "cases" in names:
            found[package.name] = importlib.import_module(f"pallas_kernels.{package.name}.cases").cases()
    return found


def build_case(family: str, label: str, implementation: str) -> Program:
    """What an implementation or a peer of the case of this label is: for a process that is handed names, not functions."""
    cases = importlib.import_module(f"pallas_kernels.{family}.cases").cases()
    case = next(case for case in cases if case.label == label)
    return case.peers[implementation]() if implementation in case.peers else case.build(cast(Implementation, implementation))
