"""What the host, the copies and the device did, and when.

A `Timeline` is a list of spans on four lanes: "host" (Python's work), "H2D" (inputs copied to the device), "compute"
(the model's steps) and "D2H" (results copied back). All times are seconds on one clock. Step N has one span on each
lane of the device ("copy_in", "step", "copy_out"), and on the host one for each thing that the host does for it:
"plan", "fill", "launch", "wait" and "commit".

The numbers that this project is about follow from the spans: how long the device was active, how long it was idle, and
what the host was doing in each idle gap. `Timeline.save` writes a trace that https://ui.perfetto.dev opens.

A batcher may serve for weeks. So its timeline keeps the newest steps only, and of the others what they add up to.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

LANES = ("host", "H2D", "compute", "D2H")
COMMANDS = ("copy_in", "step", "copy_out")  # the names of a step's spans on the lanes of the device
MOST_NOTES = 10_000  # that wait to be settled, if nobody reads and nobody waits
_settling = threading.RLock()  # (Not one for each timeline: a lock cannot be copied or sent.)


class Span(NamedTuple):
    """Something that ran on `lane` for `step` from `start` to `end` (seconds)."""

    lane: str
    name: str
    step: int
    start: float
    end: float


class Step(NamedTuple):
    """What a step did. kind: "prefill" if any of its rows is a prefill, else "decode". tokens: how many it generated
    that somebody wanted. wasted: how many it generated for requests that had already ended.

    rows: how many rows it had. context: how many tokens the last query of each row attends to (itself included), added
    up over the rows. Both are 0 if they are not known, as in older traces."""

    step: int
    kind: str
    tokens: int
    wasted: int
    rows: int = 0
    context: int = 0


@dataclass(frozen=True)
class Gap:
    """An idle gap of the device: from `start` to `end` (seconds), just before the decode step `step`.

    host_s: how many seconds of it the host spent on each thing ("plan", "fill", ...)."""

    step: int
    start: float
    end: float
    host_s: dict[str, float]

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True)
class Summary:
    """The numbers of one run.

    wall_s: from the start of the first span to the end of the last. tokens: without the wasted ones. device_active,
    idle: shares from 0 to 1, over the decode steps. host_ms_per_step: host work (without waiting) of a decode step, the
    median. These three are nan if no decode step could be measured. Everything is of all steps, those too that the
    timeline has dropped, but for the median, which is of those that it keeps. A batcher with timeline=False counts
    steps and tokens only, and all times are nan.
    """

    wall_s: float
    tokens: int
    tokens_per_s: float
    steps: int
    decode_steps: int
    device_active: float
    idle: float
    host_ms_per_step: float
    wasted_tokens: int

    def as_dict(self) -> dict[str, Any]:
        """The same numbers for JSON, with None in place of nan."""
        return {key: None if value != value else value for key, value in asdict(self).items()}

    def __str__(self) -> str:
        rows = (
            ("wall time", f"{self.wall_s:.3f} s"),
            ("tokens", f"{self.tokens}"),
            ("tokens per second", f"{self.tokens_per_s:.1f}"),
            ("steps (decode only)", f"{self.steps} ({self.decode_steps})"),
            ("device active", f"{100 * self.device_active:.1f} %"),
            ("device idle", f"{100 * self.idle:.1f} %"),
            ("host work per step", f"{self.host_ms_per_step:.3f} ms"),
            ("wasted tokens", f"{self.wasted_tokens}"),
        )
        return "\n".join(f"{name:<20} {value:>14}" for name, value in rows)


def idle_gaps(starts, ends) -> list[tuple[int, float]]:
    """The idle gaps between the steps of a device, as a list of (i, seconds): before step i, the device was idle for
    that long. A step that starts when the one before it ends has no gap before it.

    starts, ends: lists of seconds, one for each step, in order."""
    return [(i, starts[i] - ends[i - 1]) for i in range(1, len(starts)) if starts[i] > ends[i - 1]]


def device_activity(starts, ends, counted=None) -> tuple[float, float]:
    """(active_s, period_s) of the steps of a device, added up: how long they ran, and how long their periods were.

    The period of a step goes from the end of the step before it to its own end. The first step has none: left out.
    starts, ends: lists or arrays of seconds, one for each step, in order. counted: one bool for each step, whether it
    is added up (the first never is); None adds up all others."""
    starts, ends = np.asarray(starts, float), np.asarray(ends, float)
    counted = np.ones(len(ends), bool) if counted is None else np.asarray(counted, bool)
    counted = counted[1:]
    # Added up one after the other, unlike by numpy's `sum`: to the bit what a batcher's running totals are.
    active, period = np.r_[0.0, (ends - starts)[1:][counted]], np.r_[0.0, np.diff(ends)[counted]]
    return float(np.cumsum(active)[-1]), float(np.cumsum(period)[-1])


def union(starts, ends) -> tuple[np.ndarray, np.ndarray]:
    """The stretches that the intervals cover together, as (starts, ends), in order. No stretch touches the next.

    starts, ends: arrays of the intervals, in any order and any unit. An interval without length covers nothing."""
    starts, ends = np.asarray(starts), np.asarray(ends)
    real = ends > starts
    starts, ends = starts[real], ends[real]
    if not len(starts):
        return starts, ends
    order = np.argsort(starts, kind="stable")
    starts, reach = starts[order], np.maximum.accumulate(ends[order])
    first = np.flatnonzero(np.r_[True, starts[1:] > reach[:-1]])  # where a new stretch begins
    return starts[first], reach[np.r_[first[1:] - 1, len(reach) - 1]]


def busy_curve(starts, ends) -> tuple[np.ndarray, np.ndarray]:
    """The busy time of spans as a curve: the (times, busy seconds up to then) of its corners. Overlaps count once.

    `np.interp(t, times, busy)` is then the busy time before t, also for an array of many t.
    starts, ends: arrays of seconds, in any order."""
    starts, ends = union(np.asarray(starts, float), np.asarray(ends, float))
    if not len(starts):
        return np.zeros(1), np.zeros(1)
    busy = np.cumsum(ends - starts)
    return np.column_stack([starts, ends]).ravel(), np.column_stack([np.r_[0.0, busy[:-1]], busy]).ravel()


@dataclass
class Totals:
    """What the steps of a batcher add up to, counted as they are committed. active_s, period_s: as `device_activity`
    has them, over the decode steps. origin, end: of the spans that were dropped, the first start and the last end."""

    steps: int = 0
    decode_steps: int = 0
    tokens: int = 0
    wasted: int = 0
    active_s: float = 0.0
    period_s: float = 0.0
    origin: float = math.inf
    end: float = -math.inf

    @property
    def active(self) -> float:
        """The share of the device's time, nan before there is one."""
        return min(1.0, self.active_s / self.period_s) if self.period_s > 0 else math.nan


class Timeline:
    """The spans of one run. label: its name, such as "sync". clock: whose time it is, "host", "cuda" or "virtual".

    most_steps: it keeps the spans of so many newest steps; None keeps all. Only a timeline that is written as a batcher
    writes it, step after step, can be bounded. dropped: how many steps it had to drop; `totals` count them too.

    What is added is only noted, since the device of a synchronous loop waits meanwhile. `settle` does the rest: before
    anybody reads, and in a batcher while the host waits for the device anyway."""

    def __init__(self, label: str = "", clock: str = "host", most_steps: int | None = None):
        self.label, self.clock, self.most_steps = label, clock, most_steps
        # Plain tuples: `Span` and `Step` would stay on the garbage collector's list, and each of its looks take longer.
        # What was added and is not settled yet, in order. A batcher's host spans come here without `add`, a call less.
        self.notes: deque[tuple] = deque()
        self._spans: deque[tuple] = deque()
        self._steps: deque[tuple] = deque()
        self._dropped, self._totals = 0, Totals()
        # The newest span on "compute": its step, start and end, and the end of the span before it.
        self._computed = (-1, math.nan, math.nan, math.nan)

    def __repr__(self) -> str:
        contents = f"{len(self._settled()._spans)} spans, {len(self._steps)} steps{self.cut}"
        return f"Timeline({self.label!r}, clock={self.clock!r}, {contents})"

    @property
    def cut(self) -> str:
        """What a text should say of a timeline that has dropped steps; empty for a whole one."""
        return f", the newest {len(self.steps)} of {self.totals.steps} steps" if self.dropped else ""

    dropped = property(lambda self: self._settled()._dropped)
    totals = property(lambda self: self._settled()._totals)

    def check_whole(self, user: str) -> None:
        """ValueError if steps were dropped, in the name of `user`, who needs them all."""
        if self.dropped:
            raise ValueError(
                f"{user} needs every step, and this timeline has dropped {self.dropped} of {self.totals.steps}: open "
                f"the batcher with timeline={self.totals.steps} or more, or look at fewer (`run` begins a new one)"
            )

    @property
    def spans(self) -> list[Span]:
        """A new list of them, in the order in which they were added."""
        return [Span(*span) for span in self._all()]

    @spans.setter
    def spans(self, spans: Iterable[Span]) -> None:
        self._settled()._spans = deque(map(tuple, spans))

    @property
    def steps(self) -> list[Step]:
        """A new list of what the steps did, in the order in which they were committed."""
        return [Step(*step) for step in list(self._settled()._steps)]

    @steps.setter
    def steps(self, steps: Iterable[Step]) -> None:
        self._settled()._steps = deque(map(tuple, steps))

    def add(self, lane: str, name: str, step: int, start: float, end: float) -> None:
        """Note a span; `start` and `end` are seconds. One append and nothing else: a device may be waiting."""
        self.notes.append((lane, name, step, start, end))

    def add_step(self, step: int, kind: str, tokens: int, wasted: int, rows=0, context=0, device: Any = ()) -> None:
        """Note what a step did (as `Step` says), once it is committed. device: [start, end] of its spans on the lanes
        of the device, if they were not added; or a function that gives them, at any time from now on."""
        self.notes.append((step, kind, tokens, wasted, rows, context, device))
        if len(self.notes) > MOST_NOTES:
            self.settle()

    def settle(self) -> None:
        """Put all that was noted where it belongs, in the order in which it was noted. Any thread may call it."""
        notes = self.notes
        with _settling:
            while notes:
                *note, last = notes[0]
                times = last() if callable(last) else last  # (before the note goes: an interrupt must not lose it)
                notes.popleft()
                if len(note) < len(Span._fields):
                    self._place((*note, last))
                    continue
                for lane, name, (start, end) in zip(LANES[1:], COMMANDS, times, strict=False):
                    self._place((lane, name, note[0], start, end))
                self._count(*note)

    def _settled(self) -> Timeline:
        self.settle()
        return self

    def _all(self) -> list[tuple]:
        return list(self._settled()._spans)  # a list: another thread may be adding one

    def _place(self, span: tuple) -> None:
        lane, _, step, start, end = span
        if lane == "compute":
            self._computed = step, start, end, self._computed[2]
        self._spans.append(span)

    def _count(self, step: int, kind: str, tokens: int, wasted: int, rows: int, context: int) -> None:
        self._steps.append((step, kind, tokens, wasted, rows, context))
        totals = self._totals
        totals.steps += 1
        totals.tokens += tokens
        totals.wasted += wasted
        if kind == "decode":
            totals.decode_steps += 1
            computed, start, end, before = self._computed
            if computed == step and before == before:  # nan before the first
                totals.active_s += end - start
                totals.period_s += end - before
        if self.most_steps is not None:
            self._drop(step - self.most_steps)

    def _drop(self, last: int) -> None:
        """Drop the steps up to number `last`, which is one more with each call. Spans of steps that overlap lie between
        each other: those behind a span that is kept stay until that one goes."""
        spans, steps, totals = self._spans, self._steps, self._totals
        while steps and steps[0][0] <= last:
            steps.popleft()
            self._dropped += 1
        while spans and spans[0][2] <= last:
            _, _, _, start, end = spans.popleft()
            if start < totals.origin:
                totals.origin = start
            if end > totals.end:
                totals.end = end

    @property
    def origin(self) -> float:
        """When the first span starts (seconds) that is kept; 0.0 without spans."""
        return min((span[3] for span in self._all()), default=0.0)

    def lane(self, lane: str) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
        """The spans of a lane, in the order of their starts: (names, steps int64, starts, ends float64 in seconds)."""
        spans = sorted((span for span in self._all() if span[0] == lane), key=lambda span: span[3])
        if not spans:
            return [], np.zeros(0, np.int64), np.zeros(0), np.zeros(0)
        _, names, steps, starts, ends = zip(*spans, strict=True)
        return list(names), np.array(steps, np.int64), np.array(starts, float), np.array(ends, float)

    def _decode_steps(self) -> np.ndarray:
        return np.array([step.step for step in self.steps if step.kind == "decode"], np.int64)

    def _counted(self) -> Totals:
        """The totals, counted from spans and steps that may stand in any order."""
        decode, steps = self._decode_steps(), self.steps
        _, numbers, starts, ends = self.lane("compute")
        activity = device_activity(starts, ends, np.isin(numbers, decode))
        return Totals(len(steps), len(decode), sum(s.tokens for s in steps), sum(s.wasted for s in steps), *activity)

    def summary(self) -> Summary:
        """The run in numbers. An empty timeline has a summary too."""
        totals = self.totals if self.dropped else self._counted()
        names, steps, starts, ends = self.lane("host")
        work = np.isin(steps, self._decode_steps()) & np.array([name != "wait" for name in names], bool)
        _, which = np.unique(steps[work], return_inverse=True)
        host_s = np.bincount(which, (ends - starts)[work])
        spans = self._all()
        start, end = min([totals.origin, *(s[3] for s in spans)]), max([totals.end, *(s[4] for s in spans)])
        wall_s = end - start if start <= end else math.nan if self.dropped else 0.0
        return Summary(
            wall_s=wall_s,
            tokens=totals.tokens,
            tokens_per_s=totals.tokens / wall_s if wall_s else 0.0,
            steps=totals.steps,
            decode_steps=totals.decode_steps,
            device_active=totals.active,
            idle=1.0 - totals.active,
            host_ms_per_step=1e3 * float(np.median(host_s)) if len(host_s) else math.nan,
            wasted_tokens=totals.wasted,
        )

    def gaps(self) -> list[Gap]:
        """The idle gaps of the device before decode steps, in order of time, with what the host was doing in each.

        Together they are as long as the idle time in `summary().idle`, if the timeline has dropped no steps."""
        _, steps, starts, ends = self.lane("compute")
        late = np.array([i for i, _ in idle_gaps(starts.tolist(), ends.tolist())], np.int64)
        late = late[np.isin(steps[late], self._decode_steps())]
        steps, begins, stops = steps[late], ends[late - 1], starts[late]
        names, _, starts, ends = self.lane("host")
        kinds = np.array(names, object)
        host_s: list[dict[str, float]] = [{} for _ in late]
        for name in dict.fromkeys(names):
            times, busy = busy_curve(starts[kinds == name], ends[kinds == name])
            seconds = np.interp(stops, times, busy) - np.interp(begins, times, busy)
            for i in np.flatnonzero(seconds > 0):
                host_s[i][name] = float(seconds[i])
        return [Gap(*gap) for gap in zip(steps.tolist(), begins.tolist(), stops.tolist(), host_s, strict=True)]

    def save(self, path: str | Path) -> None:
        """Write a Chrome trace (JSON), which https://ui.perfetto.dev opens and `load` reads back exactly."""
        save_trace(path, [self])

    @classmethod
    def load(cls, path: str | Path) -> Timeline:
        """The timeline of a file that `save` wrote. ValueError if the file holds anything else."""
        timelines = load_trace(path)
        if len(timelines) != 1:
            raise ValueError(f"{path} holds {len(timelines)} timelines, expected 1: load_trace(path) gives all of them")
        return timelines[0]


def save_trace(path: str | Path, timelines: Sequence[Timeline]) -> None:
    """Write several timelines into one Chrome trace: as processes 1, 2, ..., each of which begins at time 0."""
    from .shown.trace import write

    write(path, timelines, LANES)


def load_trace(path: str | Path) -> list[Timeline]:
    """All timelines of a file that `Timeline.save` or `save_trace` wrote. ValueError for any other file."""
    from .shown.trace import read

    def timeline(label, clock, steps, spans, most_steps=None, dropped=0, totals=None) -> Timeline:
        made = Timeline(label, clock, most_steps)
        made.steps, made.spans = [Step(*step) for step in steps], spans
        made._dropped, made._totals = dropped, Totals(**totals or {})
        return made

    return read(path, timeline)
