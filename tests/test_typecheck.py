"""Values against annotations, one message each."""

import math
from dataclasses import dataclass
from typing import Literal

import pytest

from mhc_jax.errors import UserError
from mhc_jax.typecheck import check_types, shown


@dataclass(frozen=True)
class Inner:
    share: float = 0.5
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer:
    count: int = 1
    flag: bool = False
    path: str | None = None
    pair: tuple[float, float] = (0.1, 0.2)
    names: tuple[str, ...] = ()
    inner: Inner = Inner()
    maybe: Inner | None = None


GOOD = [
    {"count": 2**31 - 1},
    {"count": -5},
    {"flag": True},
    {"path": "流"},
    {"pair": (1, -0.0)},
    {"names": ("a", "b", "c")},
    {"inner": Inner(share=3.4e38, kind="b")},
    {"inner": Inner(share=-1.2e-38)},
    {"maybe": None},
    {"maybe": Inner(share=1)},
]

BAD = {
    "a float": ({"count": 1.0}, "count is 1.0; it must be a whole number"),
    "a truth value": ({"count": True}, "count is True; it must be a whole number"),
    "33 bits": ({"count": 2**32}, "count is 4294967296; whole numbers up to 2147483647"),
    "ten thousand digits": ({"count": 10**10_000}, "count is a number of thousands of digits"),
    "a number for a flag": ({"flag": 1}, "flag is 1; it must be true or false"),
    "bytes": ({"path": b"x"}, "path is b'x'; it must be text"),
    "a NUL": ({"path": "a\0"}, r"path is 'a\x00'; it must not hold a NUL"),
    "half a pair": ({"path": "\ud800"}, r"path is '\ud800', which is not UTF-8"),
    "one of two": ({"pair": (0.1,)}, "pair has 1 values; it must have 2"),
    "a list": ({"pair": [0.1, 0.2]}, "pair is [0.1, 0.2]; it must be a list of values given as a tuple"),
    "text among numbers": ({"pair": (0.1, "x")}, "pair holds a value that is 'x'; it must be a number"),
    "a number among names": ({"names": ("a", 3)}, "names holds a value that is 3; it must be text"),
    "no number": ({"inner": Inner(share=math.nan)}, "inner.share is not a number"),
    "infinity": ({"inner": Inner(share=-math.inf)}, "inner.share is -inf; it must be a finite number"),
    "too large for float32": ({"inner": Inner(share=1e39)}, "inner.share is 1e+39; it must be a finite number that float32 can hold"),
    "too small for float32": ({"inner": Inner(share=1e-39)}, "inner.share is 1e-39, which is 0 in float32"),
    "a truth value for a number": ({"inner": Inner(share=True)}, "inner.share is True; it must be a number"),
    "no choice": ({"inner": Inner(kind="c")}, "inner.kind is 'c'; it must be one of a, b"),
    "an unhashable choice": ({"inner": Inner(kind=["a"])}, "inner.kind is ['a']; it must be one of a, b"),
    "a number for a group that may be missing": ({"maybe": 3}, "maybe is 3; it must be a group of fields, Inner, or None"),
    "nonsense inside such a group": ({"maybe": Inner(kind="c")}, "maybe.kind is 'c'; it must be one of a, b"),
    "None for a group that may not": ({"inner": None}, "inner is None; it must be a group of fields, Inner"),
    "a number for a group": ({"inner": 3}, "inner is 3; it must be a group of fields, Inner"),
}


@pytest.mark.parametrize("changes", GOOD)
def test_what_fits_is_accepted(changes):
    check_types(Outer(**changes))


@pytest.mark.parametrize("what", BAD)
def test_what_does_not_fit_is_named(what):
    changes, message = BAD[what]
    with pytest.raises(UserError) as error:
        check_types(Outer(**changes))
    assert str(error.value).startswith(message)


def test_what_a_message_shows_is_short_and_printable():
    assert shown("x" * 1000) == "'" + "x" * 56 + "..."
    assert shown("\n\ud800流").isprintable() and shown("\n\ud800流").isascii()
