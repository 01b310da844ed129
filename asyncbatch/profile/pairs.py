"""What this package's two loops say of each other: ratios of pairs of runs, and whether the machine lets them count.

Both loops compute the same steps. So where equal steps took the device another time in one run of a pair than in the
other, something else kept the machine busy, and the ratio of their wall times says nothing about the loops.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..measure.percentile import median_lies_within
from ..timeline import Timeline

DISTURBED = 0.05  # share by which the device's time for equal steps may differ within a pair


@dataclass(frozen=True)
class Pairs:
    """The pairs of runs of the two loops, in order. speedups: synchronous over asynchronous wall time. device_ratios:
    the asynchronous over the synchronous run's time on the device, for decode steps of equal rows and context; None
    where the two had no such step."""

    speedups: tuple[float, ...] = ()
    device_ratios: tuple[float | None, ...] = ()

    @classmethod
    def of(cls, sync: Sequence[Timeline], other: Sequence[Timeline]) -> Pairs:
        both = list(zip(sync, other, strict=False))  # one that failed half way has fewer
        walls = [(a.summary().wall_s, b.summary().wall_s) for a, b in both]
        return cls(tuple(a / b for a, b in walls), tuple(device_ratio(a, b) for a, b in both))

    @property
    def counted(self) -> list[float]:
        """The speedups of the pairs that nothing disturbed."""
        each = zip(self.speedups, self.device_ratios, strict=True)
        return [speedup for speedup, ratio in each if not is_disturbed(ratio)]

    @property
    def void(self) -> bool:
        """Whether no ratio can be given: at most half of the pairs count."""
        return 2 * len(self.counted) <= len(self.speedups)

    @property
    def speedup(self) -> float | None:
        """The median of the pairs that count; None where that is void."""
        return None if self.void else statistics.median(self.counted)

    @property
    def interval(self) -> tuple[float, float, float] | None:
        """(low, high, confidence) of that median; None where it is void, and of a single pair."""
        return None if self.void else median_lies_within(self.counted)

    @property
    def worst_device_ratio(self) -> float | None:
        """The device's ratio that is farthest from 1."""
        known = [ratio for ratio in self.device_ratios if ratio]
        return max(known, key=lambda ratio: max(ratio, 1 / ratio), default=None)


def is_disturbed(ratio: float | None) -> bool:
    return ratio is not None and max(ratio, 1 / ratio) > 1 + DISTURBED


def device_ratio(a: Timeline, b: Timeline) -> float | None:
    """The time of b's decode steps over that of a's, of equal rows and context; None without such steps."""
    of_a, of_b = (dict(_medians(timeline)) for timeline in (a, b))
    both = of_a.keys() & of_b.keys()
    time_a, time_b = (sum(of[key] for key in both) for of in (of_a, of_b))
    return time_b / time_a if time_a > 0 and time_b > 0 else None


def _medians(timeline: Timeline) -> Iterator[tuple[tuple[int, int], float]]:
    """((rows, context), seconds): the median time of such decode steps on the device."""
    kinds = {step.step: (step.rows, step.context) for step in timeline.steps if step.kind == "decode"}
    times: dict[tuple[int, int], list[float]] = {}
    for span in timeline.spans:
        if span.lane == "compute" and span.step in kinds:
            times.setdefault(kinds[span.step], []).append(span.end - span.start)
    return ((key, statistics.median(each)) for key, each in times.items())
