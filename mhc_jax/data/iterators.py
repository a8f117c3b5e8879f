"""The Grain iterators that Grain lacks: records of a cache, a mixture by exact shares, and a position that knows what it fits.

Their states are plain data that survives JSON.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain

from mhc_jax.data.prepared import PreparedSource
from mhc_jax.errors import UserError


class CachedRecords:
    """The records of one file of a prepared source, in any order. ArrayRecord checks a hash of every record that it reads.

    Raises:
      UserError: the file is damaged, at once or when the record is read.
    """

    def __init__(self, path: Path, prepared: PreparedSource, documents: int):
        self._path = path
        self._folder = prepared.folder
        try:
            self._records = grain.sources.ArrayRecordDataSource(str(path))
            count = len(self._records)
        except (RuntimeError, OSError) as error:
            raise self._damaged(str(error)) from error
        if count != documents:
            raise self._damaged(f"it has {count} records, not {documents}")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> bytes:
        try:
            return self._records[index]
        except (RuntimeError, OSError) as error:
            raise self._damaged(f"record {int(index) + 1}: {error}") from error

    def __repr__(self) -> str:
        return f"CachedRecords({self._path})"

    def _damaged(self, what: str) -> UserError:
        return UserError(
            f"the tokenised text in {self._path} is damaged ({what}); delete the folder {self._folder} and give the same command again: "
            "the text is tokenised anew, and a run goes on from its last checkpoint"
        )


class Mixed(grain.IterDataset[Any]):
    """Elements of several data sets, so that after any number of them each has had its share to within a few elements.

    Grain's own mixture rounds shares, by up to one percent, and ends with the first parent. Here the others go on after one has ended.

    Args:
      parents: the data sets.
      shares: of the elements, from each; they sum to 1.
    """

    def __init__(self, parents: Sequence[grain.IterDataset[Any]], shares: Sequence[float]):
        super().__init__(parents)
        self._shares = tuple(shares)

    def __iter__(self) -> grain.DatasetIterator[Any]:
        return _MixedIterator([iter(parent) for parent in self._parents], self._shares)


class _MixedIterator(grain.DatasetIterator[Any]):
    def __init__(self, parents: Sequence[grain.DatasetIterator[Any]], shares: tuple[float, ...]):
        super().__init__(parents)
        self._shares = shares
        self._taken = [0] * len(parents)
        self._ended = [False] * len(parents)

    def __next__(self) -> Any:
        while not all(self._ended):
            total = sum(self._taken) + 1
            # The one that is furthest behind its share; the first of several.
            behind = [share * total - taken for share, taken in zip(self._shares, self._taken)]
            index = max((i for i, ended in enumerate(self._ended) if not ended), key=behind.__getitem__)
            try:
                element = next(self._parents[index])
            except StopIteration:
                self._ended[index] = True
            else:
                self._taken[index] += 1
                return element
        raise StopIteration

    def get_state(self) -> dict[str, Any]:
        return {"taken": list(self._taken), "parents": [parent.get_state() for parent in self._parents]}

    def set_state(self, state: dict[str, Any]) -> None:
        self._taken = list(state["taken"])
        self._ended = [False] * len(self._parents)  # a parent that has ended says so again
        for parent, of_parent in zip(self._parents, state["parents"]):
            parent.set_state(of_parent)


class PlainState(grain.IterDataset[Any]):
    """Its parent, a ConcatThenSplitIterDataset, with a state that survives JSON.

    The parent keeps tuples in its state and compares them with tuples, but JSON gives back lists.
    """

    def __iter__(self) -> grain.DatasetIterator[Any]:
        return _PlainStateIterator(iter(self._parent))


class _PlainStateIterator(grain.DatasetIterator[Any]):
    def __next__(self) -> Any:
        return next(self._parent)

    def get_state(self) -> dict[str, Any]:
        state = self._parent.get_state()
        return {**state, "remainder_slices": {name: list(bounds) for name, bounds in state["remainder_slices"].items()}}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state({**state, "remainder_slices": {name: tuple(bounds) for name, bounds in state["remainder_slices"].items()}})


class Positioned(grain.IterDataset[Any]):
    """Its parent, with a state that says what it fits and is refused elsewhere.

    Args:
      parent: the data set.
      fits: what decides the elements and their order, by the names that a message shall use; JSON values.
    """

    def __init__(self, parent: grain.IterDataset[Any], fits: dict[str, Any]):
        super().__init__(parent)
        self._fits = fits

    def __iter__(self) -> grain.DatasetIterator[Any]:
        return _PositionedIterator(iter(self._parent), self._fits)


class _PositionedIterator(grain.DatasetIterator[Any]):
    def __init__(self, parent: grain.DatasetIterator[Any], fits: dict[str, Any]):
        super().__init__(parent)
        self._fits = fits

    def __next__(self) -> Any:
        return next(self._parent)

    def get_state(self) -> dict[str, Any]:
        return {"fits": dict(self._fits), "position": self._parent.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Raises UserError, naming what differs, unless the state comes from an iterator that was made with the same arguments."""
        theirs = state.get("fits", {})
        differ = [
            f"{name} {theirs.get(name, 'not recorded')}, now {self._fits.get(name, 'without')}"
            for name in dict.fromkeys([*self._fits, *theirs])
            if theirs.get(name) != self._fits.get(name)
        ]
        if differ:
            raise UserError(
                f"the saved position in the data does not fit: it was saved with {'; '.join(differ)}. Going on would repeat some text and "
                "leave out other; continue with what it was saved with, or start a new run"
            )
        self._parent.set_state(state["position"])
