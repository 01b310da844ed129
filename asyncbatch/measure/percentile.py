"""The one rule for percentiles in this package, the nearest rank: a percentile is always a value that was measured."""

from __future__ import annotations

from collections.abc import Iterable


def percentile(values: Iterable[float], percent: int) -> float:
    """The smallest of the values that at least `percent` per cent of them do not exceed (numpy: method="inverted_cdf").

    No value is made up between two measured ones; the 99th percentile of fewer than 100 values is the largest of them.
    ValueError without values, or for a `percent` that is not from 1 to 100."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("a percentile needs at least one value")
    if not 1 <= percent <= 100:
        raise ValueError(f"percent is {percent}: allowed are whole numbers from 1 to 100")
    rank = -(-percent * len(ordered) // 100)  # rounded up, in whole numbers: 0.99 * 700 is not exactly 693
    return ordered[rank - 1]


def p99(values: Iterable[float]) -> float:
    """The 99th percentile, see `percentile`."""
    return percentile(values, 99)
