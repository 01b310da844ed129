"""Attribution: why the device was idle, gap by gap.

    print(attribute(batcher.timeline))

Every idle gap of the device before a decode step is divided at the step's moments (`moments.py`). Until the host has
launched the step, the gap is the host's: the innermost latency point (`points.py`) counts; and where the host itself
waits, it is the copy out that is late, or the host's thread that has not woken up yet. From the launch on, the device
has the work: its copy in runs, or it has not begun. The parts add up to the gap.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from ..timeline import Gap, Timeline
from .moments import moments_of
from .points import COPY_IN, COPY_OUT, GC, MEANING, NOT_BEGUN, NOTHING, WAIT, WAKING, Segment, host_segments

MOST_LISTED = 10


@dataclass(frozen=True)
class AttributedGap(Gap):
    """A gap of the timeline whose `host_s` is seconds by cause, not by host span; they add up to the gap."""

    @property
    def cause(self) -> str:
        """The cause with the largest share; or the garbage collection, if it has a third: it strikes in the middle of
        some other point."""
        if self.host_s.get(GC, 0.0) > self.seconds / 3:
            return GC
        return max(self.host_s, key=lambda name: self.host_s[name])


@dataclass(frozen=True)
class Attribution:
    """All idle time of the device before decode steps (or all steps), and why.

    `idle_s`: seconds. `by`: seconds by cause, the largest first; they add up to `idle_s`. `gaps`: each gap by itself,
    in order of time. `steps`: the number of those steps, with and without a gap."""

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
            return "the device was never idle between two steps"
        lines = [f"the device was idle for {1e3 * self.idle_s:.3f} ms before {self.steps} steps, because of"]
        for name, seconds in self.by.items():
            lines.append(
                f"  {name:<20}{1e3 * seconds:>12.3f} ms {seconds / self.idle_s:>7.1%}  {MEANING.get(name, '')}"
            )
        return "\n".join(lines)


def attribute(timeline: Timeline, all_steps: bool = False) -> Attribution:
    """Divide every idle gap of the device before a decode step among its causes; with `all_steps` those before every
    other step too.

    `timeline`: that of a run within `record_points`, or any other; then the host spans themselves are all that is known
    of the host. ValueError if it has dropped steps."""
    moments = [one for one in moments_of(timeline) if all_steps or one.kind == "decode"]
    late = [one for one in moments if one.computed[0] > one.ready > -math.inf]
    if not late:
        return Attribution(0.0, {}, [], len(moments))
    begins, stops = np.array([one.ready for one in late]), np.array([one.computed[0] for one in late])
    launched = np.clip([one.launched for one in late], begins, stops)
    arrived = {span.step: span.end for span in timeline.spans if span.lane == "D2H"}
    shares = _seconds_by_point(list(_with_waiting_told(host_segments(timeline), arrived)), begins, launched)
    for one, by, low, high in zip(late, shares, launched.tolist(), stops.tolist(), strict=True):
        copying = max(min(one.copy_in[1], high) - max(one.copy_in[0], low), 0.0)
        for name, seconds in ((COPY_IN, copying), (NOT_BEGUN, high - low - copying)):
            if seconds > 1e-12:
                by[name] = by.get(name, 0.0) + seconds
    gaps = [AttributedGap(one.step, one.ready, one.computed[0], by) for one, by in zip(late, shares, strict=True)]
    total: dict[str, float] = {}
    for by in shares:
        for name, seconds in by.items():
            total[name] = total.get(name, 0.0) + seconds
    ordered = dict(sorted(total.items(), key=lambda item: -item[1]))
    return Attribution(sum(ordered.values()), ordered, gaps, len(moments))


def _with_waiting_told(segments: Iterable[Segment], arrived: dict[int, float]) -> Iterator[Segment]:
    """The segments, with what waiting was for in its place: `arrived` says when a step's results were on the host."""
    for one in segments:
        if one.name != WAIT:
            yield one
            continue
        cut = min(max(arrived.get(one.step, one.end), one.start), one.end)
        if cut > one.start:
            yield one._replace(name=COPY_OUT, end=cut)
        if cut < one.end:
            yield one._replace(name=WAKING, start=cut)


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
