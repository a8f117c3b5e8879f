"""Engram's rows in Python integers, one token at a time (arXiv 2601.07372, equations 1 and 2; the hash of the published code)."""

from collections.abc import Sequence


def row_of(window: Sequence[int], multipliers: Sequence[int], primes: Sequence[Sequence[int]], orders: Sequence[int]) -> list[int]:
    """Rows that a token reads in one layer. The window holds the token's class, that of the token before, and so on."""
    rows, offset = [], 0
    for order, of_order in zip(orders, primes):
        mix = 0
        for back in range(order):
            mix ^= window[back] * multipliers[back]
        for prime in of_order:
            rows.append(offset + mix % prime)
            offset += prime
    return rows


def window_at(classes: Sequence[int], segments: Sequence[int] | None, position: int, length: int, pad: int) -> list[int]:
    """The classes at and before a position; `pad` from the beginning, or the first change of segment, on back. Segments None: none."""
    window, reaches = [classes[position]], True
    for at in range(position - 1, position - length, -1):
        reaches = reaches and at >= 0 and (segments is None or segments[at] == segments[at + 1])
        window.append(classes[at] if reaches else pad)
    return window
