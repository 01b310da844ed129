"""The one rule for percentiles in this package, the nearest rank: a percentile is always a value that was measured."""

from __future__ import annotations

import math
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


def median_lies_within(values: Iterable[float]) -> tuple[float, float, float] | None:
    """(low, high, confidence): where the median lies with at least 95 % confidence, of which these values are a sample.
    Of fewer than 6 values all lie in between, and the confidence is less, for 2 of them 50 %. None for fewer than 2.

    It holds for any distribution: the number of values below the true median is binomial with chance 1/2 (the sign
    test)."""
    ordered = sorted(values)
    count = len(ordered)
    if count < 2:
        return None
    outside = 2  # of 2**count equally likely ways to lie about the median, those with all values on one side
    below = 0
    while 2 * sum(math.comb(count, number) for number in range(below + 2)) <= 0.05 * 2**count:
        below += 1
        outside = 2 * sum(math.comb(count, number) for number in range(below + 1))
    return ordered[below], ordered[count - 1 - below], 1 - outside / 2**count
