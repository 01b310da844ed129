"""Where the time of a run went, and what would change it: latency points, idle gaps, what-if and prediction."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..measure.attribution import attribute
from ..measure.points import points_of
from ..measure.simulate import costs_of, predict, what_if
from ..timeline import Timeline
from .report import IdleGap, IdleTime, PointTimes, Prediction, WhatIf


@dataclass(frozen=True)
class Explanation:
    """What explains the times of a run; its fields are those of `report.Run`."""

    points: tuple[PointTimes, ...]
    gaps: IdleTime
    what_if: tuple[WhatIf, ...]
    prediction: Prediction | None

    @classmethod
    def of(cls, timeline: Timeline, mode: str, slots: int) -> Explanation:
        """From a run's timeline. slots: of the asynchronous batcher. Only a synchronous run has a prediction."""
        guess = prediction(timeline, slots) if mode == "sync" else None
        return cls(point_times(timeline), idle_time(timeline), savings(timeline, mode, slots), guess)


def point_times(timeline: Timeline) -> tuple[PointTimes, ...]:
    """Each latency point of the run, each side's longest first."""
    return tuple(
        PointTimes(one.name, one.where, _known(one.median_ms), _known(one.p99_ms), one.total_s, one.share)
        for one in points_of(timeline)
    )


def _known(value: float) -> float | None:
    """None in place of nan, which JSON does not have."""
    return None if math.isnan(value) else value


def idle_time(timeline: Timeline) -> IdleTime:
    """The idle time of the device before decode steps, by what the host was doing, and the gaps that stand out."""
    idle, origin = attribute(timeline), timeline.origin
    longest = (IdleGap(gap.step, gap.start - origin, 1e3 * gap.seconds, gap.cause) for gap in idle.longest())
    return IdleTime(idle.idle_s, idle.by, tuple(longest))


def savings(timeline: Timeline, mode: str, slots: int) -> tuple[WhatIf, ...]:
    """What each latency point would give back, see `simulate.what_if`."""
    results = what_if(timeline, 1 if mode == "sync" else slots, max(slots, 2))
    return tuple(WhatIf(**one._asdict()) for one in results)


def prediction(timeline: Timeline, slots: int) -> Prediction | None:
    """Of the asynchronous loop, from a synchronous run; None where no step was measured."""
    costs = costs_of(timeline)
    if not costs:
        return None
    guess = predict(costs, max(slots, 2), sum(step.wasted for step in timeline.steps))
    return Prediction(
        sync_s=guess.sync.total_s,
        async_s=guess.asynchronous.total_s,
        gain=guess.gain,
        helps=guess.helps,
        host_ms=1e3 * guess.host_s,
        device_ms=1e3 * guess.device_s,
        text=str(guess).splitlines()[-1],
    )
