"""Attribution: what the host was doing while the device was idle.

    print(attribute(batcher.timeline))

Every idle gap of the device before a decode step is divided among the latency points (`points.py`) of the host in that
time. The innermost point counts, so the parts add up to the gap.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..timeline import Gap, Timeline
from .points import GC, MEANING, NOTHING, Segment, host_segments

MOST_LISTED = 10


@dataclass(frozen=True)
class AttributedGap(Gap):
    """A gap of the timeline whose `host_s` is seconds by latency point, not by host span; they add up to the gap."""

    @property
    def cause(self) -> str:
        """The point with the largest share; or the garbage collection, if it has a third: it strikes in the middle of
        some other point."""
        if self.host_s.get(GC, 0.0) > self.seconds / 3:
            return GC
        return max(self.host_s, key=lambda name: self.host_s[name])


@dataclass(frozen=True)
class Attribution:
    """All idle time of the device before decode steps, and what the host was doing in it.

    `idle_s`: seconds. `by`: seconds by latency point, the largest first; they add up to `idle_s`. `gaps`: each gap by
    itself, in order of time. `steps`: the number of decode steps, with and without a gap."""

    idle_s: float
    by: dict[str, float]
    gaps: list[AttributedGap]
    steps: int

    def longest(self, count: int = MOST_LISTED) -> list[AttributedGap]:
        """The gaps that stand out, the longest first: those of at least 0.2 ms and three times the median over all
        steps."""
        seconds = [gap.seconds for gap in self.gaps] + [0.0] * (self.steps - len(self.gaps))
        least = max(2e-4, 3 * float(np.median(seconds))) if seconds else 0.0
        outstanding = [gap for gap in self.gaps if gap.seconds >= least]
        return sorted(outstanding, key=lambda gap: -gap.seconds)[:count]

    def __str__(self) -> str:
        if not self.idle_s:
            return "the device was never idle between decode steps"
        lines = [
            f"the device was idle for {1e3 * self.idle_s:.3f} ms before {self.steps} decode steps; meanwhile the host"
        ]
        for name, seconds in self.by.items():
            lines.append(
                f"  {name:<20}{1e3 * seconds:>12.3f} ms {seconds / self.idle_s:>7.1%}  {MEANING.get(name, '')}"
            )
        return "\n".join(lines)


def attribute(timeline: Timeline) -> Attribution:
    """Divide every idle gap of the device before a decode step among what the host was doing in it.

    `timeline`: that of a run within `record_points`, or any other; then the host spans themselves are all that is known
    of the host. ValueError if it has dropped steps."""
    timeline.check_whole("attribution")
    gaps = timeline.gaps()
    decode = sum(step.kind == "decode" for step in timeline.steps)
    if not gaps:
        return Attribution(0.0, {}, [], decode)
    starts, ends = np.array([gap.start for gap in gaps]), np.array([gap.end for gap in gaps])
    shares = _seconds_by_point(host_segments(timeline), starts, ends)
    attributed = [AttributedGap(gap.step, gap.start, gap.end, by) for gap, by in zip(gaps, shares, strict=True)]
    total: dict[str, float] = {}
    for by in shares:
        for name, seconds in by.items():
            total[name] = total.get(name, 0.0) + seconds
    ordered = dict(sorted(total.items(), key=lambda item: -item[1]))
    return Attribution(sum(ordered.values()), ordered, attributed, decode)


def _seconds_by_point(segments: list[Segment], starts: np.ndarray, ends: np.ndarray) -> list[dict[str, float]]:
    """For each gap (`starts`, `ends`: float64 [N] seconds) the seconds by point; what no segment covers is NOTHING."""
    shares: list[dict[str, float]] = [{} for _ in starts]
    covered = np.zeros(len(starts))
    for name in dict.fromkeys(segment.name for segment in segments):
        times = np.array([(s.start, s.end) for s in segments if s.name == name])
        busy = np.cumsum(times[:, 1] - times[:, 0])
        corners = np.column_stack([np.r_[0.0, busy[:-1]], busy]).ravel()
        inside = np.interp(ends, times.ravel(), corners) - np.interp(starts, times.ravel(), corners)
        covered += inside
        for i in np.flatnonzero(inside > 0):
            shares[i][name] = float(inside[i])
    rest = ends - starts - covered
    for i in np.flatnonzero(rest > 1e-12):
        shares[i][NOTHING] = float(rest[i])
    return shares
