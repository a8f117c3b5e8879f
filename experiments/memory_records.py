"""RUN/memory.json: what a run with Engram did with its memory, as memory_study found it. Needs no JAX."""

from dataclasses import dataclass

from mhc_jax.errors import UserError
from mhc_jax.files import AnyPath, read_json

FILE = "memory.json"


@dataclass(frozen=True)
class TableUse:
    """How one order's tables in one layer were read while the run was trained; means over its heads."""

    layer: int  # counted from 0
    order: int
    rows: int  # of all heads
    touched: float  # share of the rows that some token read
    ngrams: int  # distinct n-grams of the training tokens
    colliding: float  # share of these that share their row with another; 0.. 1


@dataclass(frozen=True)
class MemoryStudy:
    """Use of the tables, and the gates of a held-out text."""

    tables: tuple[TableUse, ...]
    tokens: tuple[str, ...]  # of the beginning of the held-out text
    gates: tuple[tuple[float, ...], ...]  # for each layer with a memory and each token: mean over streams


def load_study(folder: AnyPath) -> MemoryStudy | None:
    """The study of a run folder; None where it has none.

    Raises:
      UserError: the file is damaged.
    """
    if not (folder / FILE).exists():
        return None
    try:
        data = read_json(folder / FILE)
        gates = tuple(tuple(float(x) for x in of_layer) for of_layer in data["gates"])
        return MemoryStudy(tuple(TableUse(**use) for use in data["tables"]), tuple(map(str, data["tokens"])), gates)
    except (KeyError, TypeError, ValueError, UserError) as error:
        raise UserError(f"{folder / FILE} is damaged ({error}); delete it, and the same command makes it again") from error
