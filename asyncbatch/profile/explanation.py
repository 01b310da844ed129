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
    def of(cls, timeline: Timeline, mode: str, slots: int, early_stops: int = 0, requests: int = 0) -> Explanation:
        """From a run's timeline. slots: of the asynchronous batcher. Only a synchronous run has a prediction. requests,
        early_stops: how many it served, and how many of them ended before their length limit."""
        guess = prediction(timeline, slots, early_stops, requests) if mode == "sync" else None
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
    """The idle time of the device before decode steps, and before all steps, by cause, and the gaps that stand out."""
    idle, everywhere, origin = attribute(timeline), attribute(timeline, all_steps=True), timeline.origin
    longest = (IdleGap(gap.step, gap.start - origin, 1e3 * gap.seconds, gap.cause) for gap in idle.longest())
    return IdleTime(idle.idle_s, idle.by, tuple(longest), everywhere.idle_s, everywhere.by)


def savings(timeline: Timeline, mode: str, slots: int) -> tuple[WhatIf, ...]:
    """What each latency point would give back, see `simulate.what_if`."""
    results = what_if(timeline, 1 if mode == "sync" else slots, slots)
    return tuple(WhatIf(**one._asdict()) for one in results)


def prediction(timeline: Timeline, slots: int, early_stops: int, requests: int) -> Prediction | None:
    """Of the asynchronous loop, from a synchronous run; None where no step was measured."""
    costs = costs_of(timeline)
    if not costs:
        return None
    rows = max([step.rows for step in timeline.steps], default=1)
    # Where all requests have a row from the beginning, nobody waits for one: only the last of them to end keeps the
    # loop going. Otherwise a row that ends late lets the next request in late.
    guess = predict(costs, slots, early_stops, max(rows, early_stops if requests <= rows else 1, 1))
    return Prediction(
        sync_s=guess.sync.total_s,
        async_s=guess.asynchronous.total_s,
        gain=guess.gain,
        helps=guess.helps,
        host_ms=1e3 * guess.host_s,
        between_ms=1e3 * guess.between_s,
        device_ms=1e3 * guess.device_s,
        slots=slots,
        early_stops=early_stops,
        text=str(guess).splitlines()[-1],
    )
