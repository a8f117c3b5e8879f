"""Arrays on disk and back: a folder of zarr arrays, written and read by tensorstore, one file for each part that a device holds.

Any zarr library reads them: NAME/.zarray and its chunks, with NAME the path in the tree, joined by dots. Every process writes and reads its
own parts; none waits for another. Whatever goes wrong is one exception in the process that met it.

Some arrays are split by rows and end with padding, which depends on the number of devices (`mhc_jax.tables`). They are kept without it, so
that another number of devices can read them. Both directions take `rows`: their names, and how many rows are no padding.
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from etils import epath

from mhc_jax.errors import UserError

# What tensorstore says of bytes that are missing or are not what they should be. Anything else (no permission, no network) is no damage.
DAMAGE = {"NOT_FOUND", "DATA_LOSS", "INVALID_ARGUMENT", "FAILED_PRECONDITION", "OUT_OF_RANGE"}

CODEC = ts.CodecSpec({"driver": "zarr", "compressor": {"id": "zstd", "level": 1}})

PART_BYTES = 2**28  # of an array that no devices split

Place = tuple[tuple[int, int, int], ...]  # start, stop, step along every axis

NO_ROWS: Mapping[str, int] = MappingProxyType({})


class Damaged(Exception):
    """A checkpoint that does not hold what was saved; the message says in what way."""


@dataclass(frozen=True)
class HostArray:
    """One array as this process holds it: a copy of its parts, so that the device's memory may be used again."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    part: tuple[int, ...]  # shape of every part
    parts: dict[Place, np.ndarray]  # those that no other process writes


def to_host(tree: Any, rows: Mapping[str, int] = NO_ROWS) -> list[HostArray]:
    """Copies a tree of arrays; returns when the copies are complete."""
    named = [(name_of(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    for _, leaf in named:
        if isinstance(leaf, jax.Array):
            leaf.copy_to_host_async()
    return [
        _copied(name, leaf) if isinstance(leaf, np.ndarray) else _host_array(name, leaf, _without_padding(leaf, rows.get(name)))
        for name, leaf in named
    ]


def _copied(name: str, array: np.ndarray) -> HostArray:
    """Of an array that lies in host memory and has no padding: parts of whole rows, none larger than PART_BYTES."""
    if not array.ndim:
        return HostArray(name, (), array.dtype, (), {(): array.copy()})
    size = max(PART_BYTES // max(array[:1].nbytes, 1), 1)
    others = tuple((0, length, 1) for length in array.shape[1:])
    starts = range(0, len(array), size)
    parts = {((start, min(start + size, len(array)), 1), *others): array[start : start + size].copy() for start in starts}
    return HostArray(name, array.shape, array.dtype, (min(size, len(array)), *array.shape[1:]), parts)


def _host_array(name: str, leaf: jax.Array, shape: tuple[int, ...]) -> HostArray:
    parts = {}
    for shard in leaf.addressable_shards:
        place = _cut(_place(shard.index, leaf.shape), shape)
        if shard.replica_id == 0 and _holds_any(place):
            parts[place] = np.array(shard.data)[: place[0][1] - place[0][0]] if place else np.array(shard.data)
    return HostArray(name, shape, leaf.dtype, leaf.sharding.shard_shape(leaf.shape), parts)


def write(folder: epath.Path, arrays: list[HostArray], describe: bool) -> None:
    """Writes this process's parts and returns when they are stored for good. One process describes the arrays as well.

    Raises:
      OSError: the operating system refused a write, because the disk is full for example.
      ValueError: an object store refused it.
    """
    if describe:
        _all([ts.open(_spec(folder, array.name), **_layout(array), create=True) for array in arrays])
    stores = _all([ts.open(_spec(folder, array.name), **_layout(array), open=True, assume_metadata=True) for array in arrays])
    _all(
        [
            store[_slices(place)].write(values, can_reference_source_data_indefinitely=True)
            for store, array in zip(stores, arrays)
            for place, values in array.parts.items()
        ]
    )


def _all(futures: list[Any]) -> list[Any]:
    """The results, once nothing is under way any longer, also when one has failed."""
    for error in [future.exception() for future in futures]:
        if error is None:
            continue
        if code := re.search(r"os_error_code='(\d+)'", str(error)):
            raise OSError(int(code[1]), str(error)) from error
        raise error
    return [future.result() for future in futures]


def read(folder: epath.Path, like: Any, rows: Mapping[str, int] = NO_ROWS) -> Any:
    """A tree of arrays with the shapes, types and shardings of `like`; padding is zero.

    Where `like` has a shape without a sharding, the array is NumPy's, in host memory.

    Raises:
      Damaged: an array is missing, cut, cannot be decoded or has another shape.
      UserError: an array of those in `rows` has another shape. The rows of a table are known by hashes that depend on its size.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    named = [(name_of(path), leaf) for path, leaf in leaves]
    opening = {name: ts.open(_spec(folder, name), open=True, read=True) for name, _ in named}
    stores = [_result(future, name) for name, future in opening.items()]
    reading = [_start(store, name, leaf, rows.get(name)) for store, (name, leaf) in zip(stores, named)]
    return jax.tree.unflatten(structure, [_placed(parts, name, leaf, rows.get(name)) for parts, (name, leaf) in zip(reading, named)])


def name_of(path: tuple[Any, ...]) -> str:
    """The name of an array on disk by its path in the tree."""

    def keys() -> Iterator[str]:
        for key in path:
            yield str(key.key if isinstance(key, jax.tree_util.DictKey) else key.idx)

    return ".".join(keys())


def _spec(folder: epath.Path, name: str) -> dict[str, Any]:
    return {"driver": "zarr", "kvstore": _store(f"{os.fspath(folder)}/{name}/"), "fill_missing_data_reads": False}


def _store(path: str) -> dict[str, Any]:
    scheme, separator, rest = path.partition("://")
    if not separator:
        # The folder gets its name when it is complete, so that its files need no temporary names.
        return {"driver": "file", "path": path, "file_io_locking": {"mode": "non_atomic"}}
    bucket, _, key = rest.partition("/")
    store = {"driver": {"gs": "gcs", "s3": "s3"}[scheme], "bucket": bucket, "path": key}
    if scheme == "s3" and (endpoint := os.environ.get("AWS_ENDPOINT_URL")):
        store |= {"endpoint": endpoint, "aws_region": os.environ.get("AWS_DEFAULT_REGION", "us-east-1")}
    return store


def _layout(array: HostArray) -> dict[str, Any]:
    """Without a fill value, zeros are written like any other values and a missing file is never taken for zeros."""
    chunks = ts.ChunkLayout(chunk_shape=[max(size, 1) for size in array.part])
    return {"shape": array.shape, "dtype": array.dtype, "chunk_layout": chunks, "codec": CODEC}


def _result(future: ts.Future, name: str) -> Any:
    try:
        return future.result()
    except ValueError as error:
        code = str(error).partition(":")[0]
        if code not in DAMAGE:
            raise
        raise Damaged(f"{name} cannot be read: {code.lower().replace('_', ' ')}") from error


def _start(store: ts.TensorStore, name: str, like: Any, rows: int | None) -> dict[Place, ts.Future]:
    """Begins to read every part of the array that a device of this process holds."""
    shape = _without_padding(like, rows)
    if rows is not None and store.shape != shape:
        raise UserError(
            f"the table {name} of the checkpoint is {list(store.shape)}, but the run's is {list(shape)}: which row a token reads depends "
            "on the number of rows, so a table of another size cannot be taken over. Go on with the sizes of the checkpoint, or start a "
            "new run"
        )
    if store.shape != shape or store.dtype.numpy_dtype != like.dtype:
        raise Damaged(f"{name} is {store.dtype.name}{list(store.shape)}, not {like.dtype}{list(shape)}")
    whole = tuple(slice(0, size) for size in shape)
    indices = [whole] if like.sharding is None else like.sharding.addressable_devices_indices_map(like.shape).values()
    places = {_cut(_place(index, like.shape), shape) for index in indices}
    return {place: store[_slices(place)].read() for place in places if _holds_any(place)}


def _placed(parts: dict[Place, ts.Future], name: str, like: Any, rows: int | None) -> jax.Array | np.ndarray:
    shape = _without_padding(like, rows)
    if like.sharding is None:
        (future,) = parts.values()
        return np.asarray(_result(future, name))

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        whole = _place(index, like.shape)
        place = _cut(whole, shape)
        if place == whole and _holds_any(place):
            return _result(parts[place], name)
        values = np.zeros([stop - start for start, stop, _ in whole], like.dtype)
        if _holds_any(place):
            values[: place[0][1] - place[0][0]] = _result(parts[place], name)
        return values

    return jax.make_array_from_callback(like.shape, like.sharding, part)


def _without_padding(leaf: Any, rows: int | None) -> tuple[int, ...]:
    return leaf.shape if rows is None else (rows, *leaf.shape[1:])


def _place(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> Place:
    return tuple(axis.indices(size) for axis, size in zip(index or (), shape))


def _cut(place: Place, shape: tuple[int, ...]) -> Place:
    """What of a place lies inside the shape."""
    return tuple((min(start, size), min(stop, size), step) for (start, stop, step), size in zip(place, shape))


def _holds_any(place: Place) -> bool:
    """Whether any element lies at the place; a scalar's place has no axes."""
    return all(stop > start for start, stop, _ in place)


def _slices(place: Place) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop, _ in place)
