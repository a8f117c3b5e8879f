"""Rows of a batch over processes: which ones the devices of this process hold, and the array of all that is made of them.

Every process knows whole batches (`data.pipeline`), so nothing is exchanged here.
"""

from collections.abc import Collection

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Shaped


def own_rows(sharding: NamedSharding, sequences: int, devices: Collection[jax.Device] | None = None) -> Int[np.ndarray, " own"]:
    """Numbers, rising, of the rows of which these devices hold a part; where sequences are split, others may hold their other parts.

    Args:
      sharding: of a batch; its first axis is the batch's.
      sequences: rows of the whole batch.
      devices: default those of this process.
    """
    by_row = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1]))
    devices = by_row.addressable_devices if devices is None else devices
    rows = np.arange(sequences)
    places = by_row.devices_indices_map((sequences,))
    return np.unique(np.concatenate([rows[place] for device, place in places.items() if device in devices]))


def place_rows(own: Shaped[np.ndarray, "own seq_len *more"], sequences: int, sharding: NamedSharding) -> Shaped[Array, "B S *more"]:
    """The array of all rows of a batch, from the own rows of every process, as `own_rows` numbers them."""
    numbers = own_rows(sharding, sequences)
    return jax.make_array_from_callback((sequences, *own.shape[1:]), sharding, lambda index: part_of(own, numbers, index))


def part_of(own: np.ndarray, numbers: Int[np.ndarray, " own"], index: tuple[slice, ...] | None) -> np.ndarray:
    """What a device holds of a batch at these places of the whole, which are places of own rows; `numbers` are those of `own`."""
    assert index is not None
    start, stop, _ = index[0].indices(numbers[-1] + 1)
    first = int(np.searchsorted(numbers, start))
    return own[first : first + stop - start, *index[1:]]
