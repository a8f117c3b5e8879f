"""The position in the data of a run with many processes: each reads its own share, a checkpoint holds the positions of all."""

import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


class SharedPosition(Iterator[Any]):
    """The batches of this process, with a state that holds the positions of all processes and is the same in each.

    Args:
      batches: an iterator with `get_state` and `set_state`, whose state is plain data.
    """

    def __init__(self, batches: Any):
        self._batches = batches

    def __next__(self) -> Any:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        """Every process must call this at the same step: they tell each other."""
        return {"processes": [json.loads(content) for content in _from_every_process(json.dumps(self._batches.get_state()).encode())]}

    def set_state(self, state: dict[str, Any]) -> None:
        """Raises UserError where the position was saved by other processes, or fits other data (see data.pipeline)."""
        positions = state["processes"]
        # A position of another number of processes says so itself, and is refused.
        self._batches.set_state(positions[min(jax.process_index(), len(positions) - 1)])


def _from_every_process(content: bytes) -> list[bytes]:
    if jax.process_count() == 1:
        return [content]
    lengths = multihost_utils.process_allgather(np.array(len(content)))
    padded = np.frombuffer(content.ljust(int(lengths.max()), b"\0"), np.uint8)
    return [row[:length].tobytes() for row, length in zip(multihost_utils.process_allgather(padded), lengths)]
