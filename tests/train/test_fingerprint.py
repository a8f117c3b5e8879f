"""One number for an array, whatever devices hold it, and another number when a bit of it changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mhc_jax.config import MeshConfig
from mhc_jax.parallel.mesh import make_mesh
from mhc_jax.train import fingerprint
from mhc_jax.train.fingerprint import fingerprints

SHAPES = [(), (1,), (7,), (3, 5), (2, 3, 4), (4, 1, 8), (2, 0, 3)]


def oracle(x: np.ndarray) -> int:
    """In Python's integers: the words in order, times 1, 3, 5, ..."""
    words = np.frombuffer(np.ascontiguousarray(x).tobytes(), {1: np.uint8, 2: np.uint16}.get(x.dtype.itemsize, np.uint32))
    return sum(int(word) * (2 * i + 1) for i, word in enumerate(words)) % 2**32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "int8", "bool"])
def test_it_is_the_weighted_sum_of_the_words(dtype):
    rng = np.random.default_rng(0)
    tree = {str(shape): jnp.asarray(rng.integers(-100, 100, shape), dtype) for shape in SHAPES}
    found = fingerprints(tree)
    assert found == {f"['{name}']": oracle(np.asarray(x)) for name, x in tree.items()}


def test_wide_numbers_count_with_both_halves(float64):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4)))
    assert fingerprints([x]) == {"[0]": oracle(np.asarray(x))}


def test_every_single_bit_counts():
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    changed = [x.copy() for _ in range(x.size * 32)]
    for bit, copy in enumerate(changed):
        copy.view(np.uint32).reshape(-1)[bit // 32] ^= np.uint32(1 << bit % 32)
    stacked = dict(enumerate(jnp.asarray(c) for c in changed))
    assert fingerprints([jnp.asarray(x)])["[0]"] not in fingerprints(stacked).values()


def test_swapped_values_and_not_a_number_count():
    a, b = jnp.array([1.0, 2.0, np.nan]), jnp.array([2.0, 1.0, np.nan])
    found = fingerprints([a, b, a])
    assert found["[0]"] == found["[2]"] != found["[1]"]


@pytest.mark.parametrize("spec", [(), ("fsdp",), (None, "fsdp"), (("data", "fsdp"),)])
def test_a_split_array_has_the_number_of_the_whole(spec):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((16, 8)), jnp.float32)
    split = jax.device_put(x, NamedSharding(make_mesh(MeshConfig(data=2, fsdp=4)), PartitionSpec(*spec)))
    assert fingerprints([split]) == fingerprints([x])


@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (300, 11)])
@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_numpy_arrays_have_the_numbers_of_devices_and_padding_changes_nothing(shape, dtype, monkeypatch):
    monkeypatch.setattr(fingerprint, "WORDS_AT_ONCE", 64)
    x = np.asarray(np.random.default_rng(0).standard_normal(shape) * 1000, dtype)
    padded = np.concatenate([x, np.zeros_like(x[:2])]) if x.ndim else x
    wanted = oracle(x)
    assert [list(fingerprints({"x": y}).values()) for y in (x, jnp.asarray(x), jnp.asarray(padded))] == [[wanted]] * 3
