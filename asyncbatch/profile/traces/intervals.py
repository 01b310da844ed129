"""Arithmetic of intervals, in whole nanoseconds.

A set of stretches is a pair of int64 arrays (starts, ends), in order of time and not overlapping among themselves, as
`timeline.union` makes it of intervals in any order.
"""

from __future__ import annotations

from array import array

import numpy as np

Stretches = tuple[np.ndarray, np.ndarray]


def outside(starts: np.ndarray, ends: np.ndarray, low: int, high: int) -> Stretches:
    """The parts of `low` to `high` that the stretches leave free."""
    begins, stops = np.maximum(np.r_[low, ends], low), np.minimum(np.r_[starts, high], high)
    free = stops > begins
    return begins[free], stops[free]


def covered_before(points: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """How much of the stretches lies before each point: int64, of the length of `points`."""
    if not len(starts):
        return np.zeros(len(points), np.int64)
    total = np.r_[0, np.cumsum(ends - starts)]
    index = np.searchsorted(starts, points, "right")
    last = ends[np.maximum(index - 1, 0)]
    return total[index] - np.where(index > 0, np.maximum(last - points, 0), 0)


def covered_share(stretches: Stretches, start: int, end: int) -> float:
    """The share of `start` to `end` that the stretches cover; 0 where there is nothing between the two."""
    before = covered_before(np.array([start, end]), *stretches)
    return float(before[1] - before[0]) / max(end - start, 1)


def intersections(a: Stretches, b: Stretches) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(starts, ends, index in a, index in b) of each piece in which a stretch of `a` and one of `b` overlap."""
    (a_starts, a_ends), (b_starts, b_ends) = a, b
    cuts = np.sort(np.concatenate([a_starts, a_ends, b_starts, b_ends]))
    cuts = cuts[np.r_[True, cuts[1:] != cuts[:-1]]] if len(cuts) else cuts
    begins, stops = cuts[:-1], cuts[1:]
    if not len(a_starts) or not len(b_starts) or not len(begins):
        none = np.zeros(0, np.int64)
        return none, none, none, none
    in_a = np.searchsorted(a_starts, begins, "right") - 1
    in_b = np.searchsorted(b_starts, begins, "right") - 1
    both = (in_a >= 0) & (in_b >= 0) & (begins < a_ends[in_a]) & (begins < b_ends[in_b])
    return begins[both], stops[both], in_a[both], in_b[both]


def innermost(starts: np.ndarray, ends: np.ndarray, names: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(starts, ends, names) of the stretches in which the same event is the innermost one, which is the one that began
    last among those that are running. The events come in order of start, outer events before inner ones, and may
    overlap in any way."""
    begins, stops, inner = array("q"), array("q"), array("q")
    stack: list[tuple[int, int]] = []  # (end, name), the innermost last
    now = 0
    last = int(ends.max()) if len(ends) else 0
    rows = zip([*starts.tolist(), last], [*ends.tolist(), last], [*names.tolist(), -1], strict=True)
    for start, end, name in rows:  # the last row is no event: it only brings what is on the stack to its end
        while stack and now < start:
            top_end, top_name = stack[-1]
            stop = min(top_end, start)
            if now < stop:
                begins.append(now)
                stops.append(stop)
                inner.append(top_name)
                now = stop
            if top_end <= now:
                stack.pop()
        now = start
        stack.append((end, name))
    return np.array(begins, np.int64), np.array(stops, np.int64), np.array(inner, np.int64)


def close_pauses(most: int, starts: np.ndarray, ends: np.ndarray) -> Stretches:
    """The stretches with the shortest pauses between them closed, so that at most `most` are left."""
    if len(starts) <= most:
        return starts, ends
    pauses = starts[1:] - ends[:-1]
    kept = pauses > np.partition(pauses, len(pauses) - most)[len(pauses) - most]
    return starts[np.r_[True, kept]], ends[np.r_[kept, True]]
