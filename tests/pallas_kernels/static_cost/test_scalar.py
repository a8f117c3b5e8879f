"""Scalar operations against Python's own arithmetic on 32 bits."""

import random

import numpy as np
import pytest

from pallas_kernels.static_cost.listing import Operation
from pallas_kernels.static_cost.scalar import Address, compute

NUMPY = {
    "sadd.s32": np.add,
    "ssub.s32": np.subtract,
    "smul.u32": np.multiply,
    "smulhi.u32": lambda a, b: np.uint32(int(a.view(np.uint32)) * int(b.view(np.uint32)) >> 32).view(np.int32),
    "sand.u32": np.bitwise_and,
    "sor.u32": np.bitwise_or,
    "sxor.u32": np.bitwise_xor,
    "smin.s32": np.minimum,
    "smax.s32": np.maximum,
}


def operation(name, words=()):
    return Operation(name, "%s1_s0", (), words=frozenset(words))


@pytest.mark.parametrize("name", NUMPY)
def test_integers_wrap_as_in_32_bits(name):
    random.seed(0)
    for _ in range(200):
        a, b = (random.randint(-(2**31), 2**31 - 1) for _ in range(2))
        with np.errstate(over="ignore"):
            expected = NUMPY[name](np.int32(a), np.int32(b))
        assert compute(operation(name), [a, b]) == int(expected)


@pytest.mark.parametrize("shift", [0, 1, 31])
def test_shifts(shift):
    for a in (-5, 5, -(2**31), 2**31 - 1):
        assert compute(operation("sshra.s32"), [a, shift]) == int(np.int32(a) >> np.int32(shift))
        assert compute(operation("sshrl.u32"), [a, shift]) == int((np.uint32(a % 2**32) >> np.uint32(shift)).astype(np.int32))
        assert compute(operation("sshll.u32"), [a, shift]) == int((np.uint32(a % 2**32) << np.uint32(shift)).astype(np.int32))


def test_comparisons_take_the_sign_or_not():
    assert compute(operation("scmp.lt.s32.totalorder"), [-1, 0]) is True
    assert compute(operation("scmp.lt.u32.totalorder"), [-1, 0]) is False


def test_division_gives_quotient_or_remainder():
    assert compute(operation("sdivrem.u32", ["kRem"]), [17, 5]) == 2
    assert compute(operation("sdivrem.u32"), [17, 5]) == 3


@pytest.mark.parametrize("name", ["por", "pand", "pnand", "pnor", "pxor"])
def test_an_unknown_predicate_gives_what_holds_for_both_its_values(name):
    for known in (False, True):
        both = {compute(operation(name), [known, other]) for other in (False, True)}
        expected = both.pop() if len(both) == 1 else None
        assert compute(operation(name), [known, None]) == compute(operation(name), [None, known]) == expected


def test_addresses_keep_their_allocation():
    assert compute(operation("scalar_lea.sflag"), [Address("#allocation3", 1), 1]) == Address("#allocation3", 2)
    assert compute(operation("sadd.s32"), [Address("#allocation3", 1), 1]) is None
