"""What each rank did in a run, on one clock: how idle it was, and how long the ranks waited for each other.

Ranks that share a model meet in collectives, several in each layer: nobody leaves one before all have come. So the time
of a rank in the collectives of a step has two parts. What the rank spends that spends least there is the transfer: it
came last, and waited for nobody. What another rank spends beyond that is waiting, for the slowest.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..measure.points import LANE, NO_REQUEST
from ..measure.recording import RankSteps
from ..timeline import LANES, Span, Timeline
from .rank_records import BY_KERNELS, BY_LENGTH, IN_COLLECTIVES, RankRun, Slowest

SUMS = ("tokens", "steps", "decode_steps", "wasted_tokens")  # of a summary, over the replicas
SHARES = ("device_active", "idle", "host_ms_per_step")  # means over all ranks
MEANS = (*SHARES, "device_ms_per_step")  # means over two runs in the middle


@dataclass(frozen=True)
class RankTimes:
    """A rank in one run, as it travels to rank 0. timeline: of that rank. collective_s: by the number of a step, its
    seconds in collectives; None where nobody timed them. kernels: whether these are kernels in a profiler's trace.
    requests: how many its replica answered; None of a rank that is no leader. clock_error_s: see `RankRun`."""

    rank: int
    replica: int
    tp_rank: int
    machine: str
    timeline: Timeline
    collective_s: Mapping[int, float] | None = None
    kernels: bool = False
    requests: int | None = None
    clock_error_s: float | None = None

    @property
    def steps(self) -> RankSteps:
        """As a recording takes it."""
        return RankSteps(self.rank, self.replica, self.tp_rank, self.timeline, self.collective_s)

    def moved(self, by_s: float, clock_error_s: float | None) -> RankTimes:
        """The same on another clock, that is `by_s` seconds ahead."""
        if by_s:
            made = Timeline(self.timeline.label, self.timeline.clock)
            made.steps = self.timeline.steps
            made.spans = [span._replace(start=span.start + by_s, end=span.end + by_s) for span in self.timeline.spans]
            return replace(self, timeline=made, clock_error_s=clock_error_s)
        return replace(self, clock_error_s=clock_error_s)

    def shortened(self) -> RankTimes:
        """The same without what a rank's own report needs, and those of several ranks do not: its latency points."""
        made = Timeline(self.timeline.label, self.timeline.clock)
        made.steps, made.spans = self.timeline.steps, [span for span in self.timeline.spans if span.lane in LANES]
        return replace(self, timeline=made)


def lasting_until_all_are_done(timeline: Timeline, ranks: Sequence[RankTimes]) -> None:
    """Let rank 0's timeline end when the last rank's does: until then it had no request."""
    own, last = (max((span.end for span in one.spans), default=0.0) for one in (timeline, _latest(timeline, ranks)))
    if last > own > 0.0:
        timeline.add(LANE, NO_REQUEST, -1, own, last)


def _latest(timeline: Timeline, ranks: Sequence[RankTimes]) -> Timeline:
    return max(
        [timeline, *(one.timeline for one in ranks)],
        key=lambda each: max((span.end for span in each.spans), default=0.0),
    )


# ---- the ranks together -------------------------------------------------------------------------------------------


def leaders(ranks: Sequence[RankTimes]) -> list[RankTimes]:
    return [one for one in ranks if one.tp_rank == 0]


def replicas(ranks: Sequence[RankTimes]) -> list[list[RankTimes]]:
    """The ranks of each replica."""
    groups: dict[int, list[RankTimes]] = {}
    for one in ranks:
        groups.setdefault(one.replica, []).append(one)
    return [groups[replica] for replica in sorted(groups)]


def summary_of(timeline: Timeline, ranks: Sequence[RankTimes]) -> dict[str, Any]:
    """A run's `Summary` as a dict, where `timeline` is rank 0's: tokens and steps of all replicas together, shares and
    times of a step as the means over all ranks, and the time from rank 0's first span to its last."""
    whole = timeline.summary().as_dict()
    if len(ranks) > 1:
        each = [one.timeline.summary().as_dict() for one in ranks]
        first = [one.timeline.summary().as_dict() for one in leaders(ranks)]
        whole |= {key: sum(one[key] for one in first) for key in SUMS}
        whole |= {key: mean_of([one[key] for one in each]) for key in SHARES}
        whole["tokens_per_s"] = whole["tokens"] / whole["wall_s"] if whole["wall_s"] else 0.0
    return whole


def mean_of(values: Sequence[float | None]) -> float | None:
    """None where one of them is not known."""
    known = [value for value in values if value is not None]
    return statistics.mean(known) if len(known) == len(values) and values else None


def step_times(ranks: Sequence[RankTimes]) -> list[Span]:
    """The steps of the ranks of one replica on the device, each as short as on the rank where it was shortest: there
    the device waited for no other rank."""
    shortest: dict[int, Span] = {}
    for one in ranks:
        for span in one.timeline.spans:
            if span.lane == "compute":
                before = shortest.get(span.step)
                if before is None or span.end - span.start < before.end - before.start:
                    shortest[span.step] = span
    return [shortest[step] for step in sorted(shortest)]


def without_waiting(timeline: Timeline, ranks: Sequence[RankTimes]) -> Timeline:
    """Rank 0's timeline; where ranks share its model, with steps that last as long as on the rank where they took
    least. Two loops compute the same steps, and how long their ranks wait for each other is the loops' own doing."""
    group = [one for one in ranks if one.replica == 0]
    if len(group) < 2:
        return timeline
    made = Timeline(timeline.label, timeline.clock)
    made.steps = timeline.steps
    made.spans = [span for span in timeline.spans if span.lane != "compute"] + step_times(group)
    return made


# ---- each by itself ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Waits:
    """How the ranks of a replica waited for each other, in the decode steps that all of them have. Arrays of float64
    seconds: device_s and waiting_s [rank, step]; transfer_s [step], None where it is not known."""

    ranks: tuple[int, ...]
    device_s: np.ndarray
    waiting_s: np.ndarray
    transfer_s: np.ndarray | None
    seen_in: str

    @classmethod
    def of(cls, group: Sequence[RankTimes]) -> Waits | None:
        """None for a rank by itself, and without a decode step."""
        device = [_decode_s(one.timeline) for one in group]
        steps = sorted(set.intersection(*map(set, device)))
        if len(group) < 2 or not steps:
            return None
        device_s = np.array([[of[step] for step in steps] for of in device])
        timed = [one.collective_s for one in group if one.collective_s is not None]
        if len(timed) < len(group):
            return cls(tuple(one.rank for one in group), device_s, device_s - device_s.min(axis=0), None, BY_LENGTH)
        spent_s = np.array([[of.get(step, 0.0) for step in steps] for of in timed])
        transfer_s = spent_s.min(axis=0)
        seen_in = BY_KERNELS if group[0].kernels else IN_COLLECTIVES
        return cls(tuple(one.rank for one in group), device_s, spent_s - transfer_s, transfer_s, seen_in)

    @property
    def slowest(self) -> int:
        """The place of the rank that waited least: the others wait for it."""
        return int(self.waiting_s.sum(axis=1).argmin())


def _decode_s(timeline: Timeline) -> dict[int, float]:
    """Seconds on the device of each decode step, by its number."""
    decode = {step.step for step in timeline.steps if step.kind == "decode"}
    return {s.step: s.end - s.start for s in timeline.spans if s.lane == "compute" and s.step in decode}


def slowest_of(ranks: Sequence[RankTimes], replica: int) -> Slowest | None:
    """The slowest rank of a replica; None where its model is not shared, or no decode step was measured."""
    group = replicas(ranks)[replica]
    waits = Waits.of(group)
    if waits is None:
        return None
    others = np.arange(len(group)) != waits.slowest
    waiting_s, device_s = waits.waiting_s[others], waits.device_s[others]
    return Slowest(
        replica,
        waits.ranks[waits.slowest],
        float((waiting_s.sum(axis=1) / device_s.sum(axis=1)).mean()),
        1e3 * float(waiting_s.mean()),
        None if waits.transfer_s is None else 1e3 * float(waits.transfer_s.mean()),
        waits.seen_in,
    )


def rank_runs(middle: Sequence[Sequence[RankTimes]], timed: Sequence[RankTimes] = ()) -> tuple[RankRun, ...]:
    """What the report says of each rank of a run. middle: the ranks of the runs in the middle, of which shares and
    times of a step are the means; all else is of the last one. timed: the ranks of another run, of which it is known
    what they spent in collectives, where nobody timed these in this one."""
    of_replica = {group[0].replica: Waits.of(group) for group in replicas(timed or middle[-1])}
    each = [[_rank_run(one, of_replica.get(one.replica)) for one in ranks] for ranks in middle]
    return tuple(
        replace(of_runs[-1], **{key: mean_of([getattr(one, key) for one in of_runs]) for key in MEANS})
        for of_runs in zip(*each, strict=True)
    )


def _rank_run(one: RankTimes, waits: Waits | None) -> RankRun:
    summary = one.timeline.summary().as_dict()
    computed = [span.end for span in one.timeline.spans if span.lane == "compute"]
    decode_s = list(_decode_s(one.timeline).values())
    collectives_s = waiting_s = in_collectives = waiting = None
    if waits is not None and one.rank in waits.ranks:
        at = waits.ranks.index(one.rank)
        device_s, waiting_s = float(waits.device_s[at].sum()), float(waits.waiting_s[at].sum())
        waiting = waiting_s / device_s if device_s else None
        if waits.transfer_s is not None:
            collectives_s = waiting_s + float(waits.transfer_s.sum())
            in_collectives = collectives_s / device_s if device_s else None
    return RankRun(
        rank=one.rank,
        replica=one.replica,
        tp_rank=one.tp_rank,
        machine=one.machine,
        requests=one.requests,
        wall_s=max(computed) - one.timeline.origin if computed else None,
        **{key: summary[key] for key in ("tokens", "steps", "device_active", "idle", "host_ms_per_step")},
        device_ms_per_step=1e3 * statistics.median(decode_s) if decode_s else None,
        collectives_s=collectives_s,
        waiting_s=waiting_s,
        in_collectives=in_collectives,
        waiting=waiting,
        clock_error_s=one.clock_error_s,
    )
