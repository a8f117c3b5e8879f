"""Which operations of a bundle listing decide where control goes and what is copied: the part of a kernel that `machine` runs."""

from pallas_kernels.static_cost.listing import Listing, Operation
from pallas_kernels.static_cost.scalar import is_known


def has_effect(operation: Operation) -> bool:
    """Whether it branches, copies or sets a semaphore."""
    return operation.name == "sbr.rel" or operation.name.startswith("dma.") or operation.name in ("vsyncadd", "vsyncpa")


def is_strange(operation: Operation) -> bool:
    """Whether the model lacks the operation, as against its result being data."""
    return operation.name != "sst" and not has_effect(operation) and not is_known(operation.name)


def guards_of(listing: Listing, run: bool) -> dict[str, bool]:
    """The predicates of forward branches, with the value for which the code behind the branch is run, or for which it is not."""
    found: dict[str, bool] = {}
    for place, bundle in enumerate(listing.bundles):
        for operation in bundle:
            if (
                operation.name == "sbr.rel"
                and operation.predicate
                and listing.index.get(int(operation.named.get("target", -1)), -1) > place
            ):
                found[operation.predicate] = operation.negated == run
    return found


def needed_values(listing: Listing) -> set[str]:
    """Names of the values that decide control, DMAs or semaphores, and of stores that carry them."""
    makers: dict[str, list[Operation]] = {}
    stores: dict[str, list[Operation]] = {}
    open_names: list[str] = []
    for bundle in listing.bundles:
        for operation in bundle:
            if operation.name == "sst":
                stores.setdefault(operation.operands[0], []).append(operation)
            elif operation.result:
                makers.setdefault(operation.result, []).append(operation)
            if has_effect(operation):
                open_names += operation.reads
    needed: set[str] = set()
    while open_names:
        name = open_names.pop()
        if name in needed:
            continue
        needed.add(name)
        for maker in makers.get(name, ()):
            open_names += maker.reads
            if maker.name == "sld":
                for store in stores.get(maker.operands[0], ()):
                    open_names += [*store.reads, store.result or ""]
    return needed


def memories_of(listing: Listing) -> dict[str, str]:
    """The memory that each pointer value points into, where the operation that makes it says so: "hbm", "vmem", "smem"."""
    found: dict[str, str] = {}
    for bundle in listing.bundles:
        for operation in bundle:
            memory = operation.name.rpartition(".")[2]
            if operation.result and memory in ("hbm", "vmem", "smem") and not operation.name.startswith("dma."):
                found[operation.result] = memory
    return found
