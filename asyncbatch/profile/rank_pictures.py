"""The runs of several ranks as a picture: each rank with its host and its device, each run from its own beginning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..pictures.ranks import CollectiveSpan, plot_ranks
from ..pictures.timelines import TimelineFigure, plot
from ..shown.trace import write
from ..timeline import LANES, Timeline
from .rank_times import RankTimes, replicas

NOTE = (
    "What a step spends in collectives is spread over it. Here it stands at the step's end, added up: the waiting for "
    "the slowest rank, then the exchange."
)


def plot_runs(
    timelines: Sequence[Timeline], ranks: Sequence[Sequence[RankTimes]] = (), **options: Any
) -> TimelineFigure:
    """The runs with these timelines; of several ranks those of all, on one clock. ranks: of each run, nothing for one
    of a single rank. options: of `plot`."""
    of_runs = list(ranks) or [()] * len(timelines)
    if not any(of_runs):
        return plot(*timelines, **options)
    drawn, names, origins, collectives = [], [], [], []
    for timeline, group in zip(timelines, of_runs, strict=True):
        each = [one.timeline for one in group] or [timeline]
        origin = min((one.origin for one in each if one.spans), default=0.0)
        drawn += each
        origins += [origin] * len(each)
        names += [f"{timeline.label}, rank {one.rank}" for one in group] or [timeline.label]
        spans = collective_spans(group)
        collectives += [spans.get(one.rank, []) for one in group] or [[]]
    return plot_ranks(drawn, collectives, names=names, origins=origins, **options)


def collective_spans(ranks: Sequence[RankTimes]) -> dict[int, list[CollectiveSpan]]:
    """By rank, what each of its steps spends in collectives, at the end of the step. Nothing of a replica whose
    collectives nobody timed."""
    found = {}
    for group in replicas(ranks):
        timed = [one.collective_s for one in group if one.collective_s is not None]
        if len(timed) < len(group):
            continue
        common = set.intersection(*map(set, timed))
        for one, spent_s in zip(group, timed, strict=True):
            computed = (s for s in one.timeline.spans if s.lane == "compute" and s.step in common)
            found[one.rank] = [
                _at_the_end(span.step, span.start, span.end, spent_s[span.step], min(of[span.step] for of in timed))
                for span in computed
            ]
    return found


def _at_the_end(step: int, start: float, end: float, spent_s: float, transfer_s: float) -> CollectiveSpan:
    arrived = max(start, end - spent_s)
    return CollectiveSpan(step, arrived, max(arrived, end - transfer_s), end)


def write_traces(path: Path, timelines: Sequence[Timeline], ranks: Sequence[Sequence[RankTimes]]) -> None:
    """Write the timelines of the runs as one trace; of several ranks those of all, named by run and rank."""
    made, origins = [], []
    for timeline, group in zip(timelines, list(ranks) or [()] * len(timelines), strict=True):
        each = [(one.timeline, f"{timeline.label}, rank {one.rank}") for one in group] or [(timeline, timeline.label)]
        origin = min((one.origin for one, _ in each if one.spans), default=0.0)
        for one, label in each:
            named = Timeline(label, one.clock)
            named.spans, named.steps = one.spans, one.steps
            made.append(named)
            origins.append(origin)
    write(path, made, LANES, origins)
