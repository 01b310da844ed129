"""Latency points: where the time of a step goes, and what the host did while the device was idle.

    with record_points(batcher):
        batcher.run(requests)
    print(attribute(batcher.timeline))        # the idle time, by what the host was doing in it
    for point in points_of(batcher.timeline): # median, p99 and share of each part of a step
        print(point)

A batcher's timeline has five host spans a step (plan, fill, launch, wait, commit). `record_points` adds what lies
inside them, on the lane "points", by wrapping a few methods of the batcher's own objects for so long: the loops stay as
they are, and who does not measure pays nothing. Spans nest, and the innermost one counts: the time of "admit" is
without that of the "KV allocate" inside it. Calls of one kind that follow each other are drawn as one span, from the
first one on and as long as all of them together.

What the names mean is in `MEANING`.
"""

from __future__ import annotations

import bisect
import contextlib
import gc
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from ..timeline import Timeline
from .percentile import p99

LANE, DEVICE_LANE = "points", "device points"
MEANING = {
    "schedule": "which rows are in the step, without what stands below by itself",
    "admit": "which waiting requests join, and which piece of each prompt",
    "KV allocate": "handing out blocks of the KV cache",
    "fill buffers": "writing the step's inputs into the slot's host buffers",
    "H2D launch": "launching the copy of the inputs, and recording its event",
    "step launch": "launching the step on the compute stream, with its waits",
    "D2H launch": "launching the copy of the output ids",
    "wait": "waiting for the output ids to arrive, and waking up",
    "commit": "appending tokens, ending requests, answering callers",
    "prune": "giving a finished request's blocks back",
    "detokenize": "turning tokens into text, to look for stop strings",
    "callbacks": "the caller's code between two turns of the loop: progress bar, readers of a stream",
    "garbage collection": "Python's garbage collector, wherever it struck",
    "no request": "nothing to serve: the next request had not arrived",
    "added host work": "what host_work_s burns, for lessons",
    "nothing recorded": "in none of these: between two of them, or the operating system",
    "copy in": "the inputs, host to device",
    "carry-over": "tokens of the step before become inputs",
    "forward": "the model",
    "sample": "choosing the next tokens",
    "step": "the whole step on the device, where its parts are not told apart (a timed device, another engine)",
    "copy out": "the output ids, device to host",
}
OF_SPAN = {"plan": "schedule", "fill": "fill buffers", "launch": "step launch"}  # what a host span is without its parts
OF_COMMAND = {"copy_in": "copy in", "copy_out": "copy out"}
LAUNCHES = ("H2D launch", "step launch", "D2H launch")
FIRST_COMMANDS = ("launch", "wait_event", "wait_event")  # of each stream, in `launch_step`
PARTS = ("carry-over", "forward", "sample")
AFTER = ("commit", "prune", "detokenize")  # points that a step pays when it is done; all others come before it
NOTHING, WAIT, GC, CALLBACKS, ADDED = "nothing recorded", "wait", "garbage collection", "callbacks", "added host work"
NO_REQUEST = "no request"
MOST_LISTED = 10


# ---- recording ------------------------------------------------------------------------------------------------------


class _Recorder:
    """Logs calls, and makes spans of them when the run is over. In a synchronous loop every microsecond between two
    steps is one that the device waits, and code that last ran 2 ms ago is in no cache any more: so as little as
    possible runs there, and whatever the host spans tell (which step it was, where a launch ends, what lies between two
    turns) is not asked again."""

    def __init__(self, batcher: Any):
        self.batcher, self.now = batcher, getattr(batcher.device, "now", perf_counter)
        self.timeline: Timeline = batcher.timeline  # of an earlier run, until the next one begins
        self.since = self.now()
        self.calls: list[Any] = []  # name, start, end of each call; and of the next call; and so on
        self.parts: list[Any] = []  # start of a step on the device and seconds of its parts; and so on
        self.collections: list[tuple[Timeline, float, float]] = []
        self._collecting: float | None = None

    # Logging: these run in the loop.

    def timed(self, name: str, function: Callable) -> Callable:
        """`function`, each of whose calls is noted as `name`."""
        note, now = self.calls.extend, self.now

        def wrapper(*arguments, **options):
            start = now()
            try:
                return function(*arguments, **options)
            finally:
                note((name, start, now()))

        return wrapper

    def begins(self, name: str, function: Callable) -> Callable:
        """`function`, with whose call `name` begins, to go on until the next launch, or the end of the host span."""
        note, now = self.calls.extend, self.now

        def wrapper(*arguments):
            note((name, now(), None))
            return function(*arguments)

        return wrapper

    def plan(self, function: Callable) -> Callable:
        """The scheduler's `plan`, after which, in the same host span, host_work_s is burnt."""
        note, now, burnt_s = self.calls.extend, self.now, self.batcher.config.host_work_s

        def plan():
            made = function()
            if made is not None:
                start = now()
                note((ADDED, start, start + burnt_s))
            return made

        return plan

    def spans(self, function: Callable) -> Callable:
        """After a step, its parts on the device."""
        note, parts_of = self.parts.extend, self.batcher.device.parts

        def spans(slot: int):
            found = function(slot)
            note((found[1, 0], parts_of(slot)))
            return found

        return spans

    def collected(self, phase: str, _: dict) -> None:
        if phase == "start":
            self._collecting = self.now()
        elif self._collecting is not None:
            self.collections.append((self.batcher.timeline, self._collecting, self.now()))

    # Making spans.

    def new_timeline(self, function: Callable) -> Callable:
        def new_timeline() -> Timeline:
            self.settle()
            self.timeline = function()
            return self.timeline

        return new_timeline

    def settle(self) -> None:
        """Put what was logged on the timeline that it belongs to."""
        host = _HostSpans(self.timeline)
        for step, start, end in host.between_turns():
            if start >= self.since:
                self.timeline.add(LANE, CALLBACKS, step, start, end)
        calls = sorted(zip(*[iter(self.calls)] * 3, strict=True), key=lambda call: call[1])
        for name, step, start, end in _joined(calls, host):
            self.timeline.add(LANE, name, step, start, end)
        _, steps, starts, _ = self.timeline.lane("compute")
        step_at = dict(zip(starts.tolist(), steps.tolist(), strict=True))
        for start, parts in zip(*[iter(self.parts)] * 2, strict=True):
            start = float(start)
            if start not in step_at:  # Ctrl-C came before the step was noted
                continue
            step = step_at[start]
            for name, seconds in zip(PARTS, parts, strict=True):  # one after the other, from the step's start on
                if seconds > 0:
                    self.timeline.add(DEVICE_LANE, name, step, start, start + seconds)
                    start += seconds
        for timeline, collections in itertools.groupby(self.collections, key=lambda one: one[0]):
            over = max((span.end for span in timeline.spans), default=0.0)
            for _, start, end in collections:
                if start < over:
                    timeline.add(LANE, GC, host.at(start)[1], start, end)
        for log in (self.calls, self.parts, self.collections):
            log.clear()


class _HostSpans:
    """The spans of the host lane, in order."""

    def __init__(self, timeline: Timeline):
        self.names, steps, starts, ends = timeline.lane("host")
        self.steps, self.starts, self.ends = steps.tolist(), starts.tolist(), ends.tolist()
        self.launches = [which for which, name in enumerate(self.names) if name == "launch"]
        self.launch_starts = [self.starts[which] for which in self.launches]
        self.empty = [span for span in timeline.spans if span.name == NO_REQUEST]

    def at(self, moment: float) -> tuple[int | None, int]:
        """(which, its step) of the host span in which `moment` lies; between two of them None and the step before."""
        which = bisect.bisect_right(self.starts, moment) - 1
        if which < 0:
            return None, 0
        return (which if moment <= self.ends[which] else None), self.steps[which]

    def launch_at(self, moment: float) -> int | None:
        """Which host span is the launch that `moment` belongs to. (On the virtual clock it may be the launch's last
        moment, and so the first one of the wait.)"""
        launch = bisect.bisect_right(self.launch_starts, moment) - 1
        which = self.launches[launch] if launch >= 0 else None
        return which if which is not None and moment <= self.ends[which] else None

    def between_turns(self) -> Iterator[tuple[int, float, float]]:
        """(step, start, end) of each time between two turns, which is the caller's. A turn begins with a plan. Where
        there was no request, the times before and after that."""
        others = [(start, end, NO_REQUEST, -1) for _, _, _, start, end in self.empty]
        spans = sorted([*zip(self.starts, self.ends, self.names, self.steps, strict=True), *others])
        step = 0
        for (_, end, _, before), (start, _, name, _) in itertools.pairwise(spans):
            step = step if before < 0 else before
            if name in ("plan", NO_REQUEST) and end < start:
                yield step, end, start


def _joined(calls: list[tuple[str, float, float | None]], host: _HostSpans) -> list[tuple[str, int, float, float]]:
    """(name, step, start, end) of calls (name, start, end) that come by start; the end of a launch is None, for the
    next one's start, or the end of the host span. Calls of one kind that follow each other in a host span become one
    piece, from the first one's start and as long as all of them together. What lies in no host span was for no step: a
    look at the empty queue."""
    pieces: list[list[Any]] = []
    last: Any = None
    open_ends: list[float] = []  # of the calls that we are in, outermost first
    for (name, start, end), following in itertools.zip_longest(calls, calls[1:]):
        which = host.at(start)[0] if end is not None else host.launch_at(start)
        if which is None:
            continue
        if end is None:
            is_next = following is not None and host.launch_at(following[1]) == which
            end = following[1] if is_next else host.ends[which]
        while open_ends and open_ends[-1] <= start:
            open_ends.pop()
        kind = name, which, tuple(open_ends)
        if kind == last:
            pieces[-1][3] += end - start
        else:
            pieces.append([name, host.steps[which], start, end])
        last = kind
        open_ends.append(end)
    return [tuple(piece) for piece in pieces]


class _TimedTokenizer:
    """The caller's tokenizer, with a `decode` that is timed; the caller's own object is not touched."""

    def __init__(self, tokenizer: Any, recorder: _Recorder):
        self._tokenizer, self.decode = tokenizer, recorder.timed("detokenize", tokenizer.decode)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within it, the method or attribute `name` of this one object is `value`.

    It is not looked up in `vars(owner)` whether the object has it from its class: CPython serves an object
    whose dictionary was once asked for more slowly ever after, and these are in the hot loop."""
    before, of_class = getattr(owner, name), getattr(type(owner), name, None)
    from_class = of_class is not None and before == of_class.__get__(owner)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if from_class:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@contextlib.contextmanager
def record_points(batcher: Any) -> Iterator[None]:
    """Every run of the batcher within it gets its latency points, on the timeline's lanes "points" and "device points".
    They are put there when the next run begins, and at the end.

    For this package's batchers. Of any other that has a `timeline`, only garbage collections are noted."""
    recorder = _Recorder(batcher)
    undo = contextlib.ExitStack()

    def replace(owner: Any, name: str, value: Any) -> None:
        undo.enter_context(replaced(owner, name, value))

    def time(owner: Any, name: str, point: str) -> None:
        replace(owner, name, recorder.timed(point, getattr(owner, name)))

    if hasattr(batcher, "scheduler"):
        scheduler, kv, device = batcher.scheduler, batcher.kv, batcher.device
        replace(batcher, "_new_timeline", recorder.new_timeline(batcher._new_timeline))
        if batcher.config.host_work_s:
            replace(scheduler, "plan", recorder.plan(scheduler.plan))
        time(scheduler, "_prefill_rows", "admit")
        time(kv, "_grow", "KV allocate")
        time(kv, "prune", "prune")
        for stream, method, point in zip(device.streams, FIRST_COMMANDS, LAUNCHES, strict=True):
            replace(stream, method, recorder.begins(point, getattr(stream, method)))
        if hasattr(device, "parts"):
            replace(device, "spans", recorder.spans(device.spans))
        if batcher.tokenizer is not None:
            replace(batcher, "tokenizer", _TimedTokenizer(batcher.tokenizer, recorder))
    # On the virtual clock a collection takes no time, and asking for the time, which lets commands take effect, is not
    # allowed in the middle of anything.
    collected = [recorder.collected] if getattr(getattr(batcher, "config", None), "clock", None) is None else []
    gc.callbacks += collected
    try:
        yield
    finally:
        for callback in collected:
            gc.callbacks.remove(callback)
        recorder.settle()
        undo.close()


# ---- what was recorded ----------------------------------------------------------------------------------------------


class Segment(NamedTuple):
    """From `start` to `end` (seconds) the host was at `name`, the innermost point there; `step` and `after` say which
    step it was for and whether it came after that step."""

    name: str
    step: int
    start: float
    end: float
    after: bool


def host_segments(timeline: Timeline) -> list[Segment]:
    """What the host did, in order and without overlaps: of nested spans, the innermost one counts."""
    spans = []
    for lane, name, step, start, end in timeline.spans:
        if end > start and lane in ("host", LANE):
            spans.append((start, -end, lane == LANE, name, step))
    spans.sort()
    segments: list[Segment] = []
    stack: list[tuple[float, str, int, bool]] = []  # end, name, step, after: the spans that are open, outermost first
    at = -math.inf

    def until(moment: float) -> None:
        """Write down the time up to `moment`, closing the spans that end before it."""
        nonlocal at
        while stack:
            end, name, step, after = stack[-1]
            stop = min(end, moment)
            if stop > at:
                segments.append(Segment(name, step, at, stop, after))
                at = stop
            if end > moment:
                return
            stack.pop()
        at = max(at, moment)

    for start, negative_end, is_point, name, step in spans:
        until(start)
        at = max(at, start)
        after = name in AFTER
        if is_point and stack:
            after = stack[-1][3]
            step = stack[-1][2]
        elif is_point:
            step, after = step + 1, False  # between two turns: the next step waits for it
        if not is_point:
            name = OF_SPAN.get(name, name)
        end = min(-negative_end, stack[-1][0]) if stack else -negative_end
        stack.append((end, name, step, after))
    until(math.inf)
    return segments


@dataclass(frozen=True)
class Idle:
    """The device idle before decode step `step` from `start` to `end` (seconds); `by`: seconds of it by point."""

    step: int
    start: float
    end: float
    by: dict[str, float]

    @property
    def seconds(self) -> float:
        return self.end - self.start

    @property
    def cause(self) -> str:
        """The point that has most of it, or a garbage collection that has a third: it strikes in the middle of one."""
        if self.by.get(GC, 0.0) > self.seconds / 3:
            return GC
        return max(self.by, key=lambda name: self.by[name])


@dataclass(frozen=True)
class Attribution:
    """All idle time of the device before decode steps, and what the host was doing in it: `by` adds up to `idle_s`.
    `gaps`: each by itself, in order of time. `steps`: how many decode steps were looked at."""

    idle_s: float
    by: dict[str, float]
    gaps: list[Idle]
    steps: int

    def longest(self, count: int = MOST_LISTED) -> list[Idle]:
        """The gaps that stand out: at least three times the median gap of all steps and 0.2 ms, the longest first."""
        seconds = [gap.seconds for gap in self.gaps] + [0.0] * (self.steps - len(self.gaps))
        least = max(2e-4, 3 * float(np.median(seconds))) if seconds else 0.0
        found = [gap for gap in self.gaps if gap.seconds >= least]
        return sorted(found, key=lambda gap: -gap.seconds)[:count]

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
    """Every idle gap of the device before a decode step, by what the host was doing then."""
    gaps = [(gap.step, gap.start, gap.end) for gap in timeline.gaps()]
    decode = sum(step.kind == "decode" for step in timeline.steps)
    if not gaps:
        return Attribution(0.0, {}, [], decode)
    begins, stops = (np.array([gap[i] for gap in gaps]) for i in (1, 2))
    segments = host_segments(timeline)
    found: list[dict[str, float]] = [{} for _ in gaps]
    covered = np.zeros(len(gaps))
    for name in dict.fromkeys(segment.name for segment in segments):
        times = np.array([(s.start, s.end) for s in segments if s.name == name])
        busy = np.cumsum(times[:, 1] - times[:, 0])
        corners = np.column_stack([np.r_[0.0, busy[:-1]], busy]).ravel()
        inside = np.interp(stops, times.ravel(), corners) - np.interp(begins, times.ravel(), corners)
        covered += inside
        for i in np.flatnonzero(inside > 0):
            found[i][name] = float(inside[i])
    rest = stops - begins - covered
    for i in np.flatnonzero(rest > 1e-12):
        found[i][NOTHING] = float(rest[i])
    idle = [Idle(*gap, by) for gap, by in zip(gaps, found, strict=True)]
    total: dict[str, float] = {}
    for gap in idle:
        for name, seconds in gap.by.items():
            total[name] = total.get(name, 0.0) + seconds
    ordered = dict(sorted(total.items(), key=lambda item: -item[1]))
    return Attribution(sum(ordered.values()), ordered, idle, decode)


@dataclass(frozen=True)
class Point:
    """A part of a step. where: "host" or "device". median_ms, p99_ms: of the decode steps, milliseconds a step.
    total_s: seconds in the whole run. share: of the host's or the device's time in all points of its side."""

    name: str
    where: str
    median_ms: float
    p99_ms: float
    total_s: float
    share: float

    def __str__(self) -> str:
        return (
            f"{self.name:<20}{self.where:<8}median {self.median_ms:8.3f} ms  p99 {self.p99_ms:8.3f} ms  "
            f"{self.share:6.1%}  {MEANING.get(self.name, '')}"
        )


def seconds_by_step(timeline: Timeline) -> tuple[dict[tuple[str, bool], dict[int, float]], dict[str, dict[int, float]]]:
    """(host, device): for each host point, and whether it comes after its step, seconds by step; for each device point
    seconds by step."""
    host: dict[tuple[str, bool], dict[int, float]] = {}
    for name, step, start, end, after in host_segments(timeline):
        of_step = host.setdefault((name, after), {})
        of_step[step] = of_step.get(step, 0.0) + end - start
    device: dict[str, dict[int, float]] = {}
    parts: dict[int, float] = {}
    for lane, name, step, start, end in timeline.spans:
        if lane == DEVICE_LANE:
            device.setdefault(name, {})[step] = end - start
            parts[step] = parts.get(step, 0.0) + end - start
    for lane, name, step, start, end in timeline.spans:
        if lane in ("H2D", "compute", "D2H"):
            rest = end - start - (parts.get(step, 0.0) if lane == "compute" else 0.0)
            # What is left of a step beside its parts: reading its inputs, and the clock itself.
            name = OF_COMMAND.get(name, "step" if step not in parts else "forward")
            of_step = device.setdefault(name, {})
            of_step[step] = of_step.get(step, 0.0) + max(rest, 0.0)
    return host, device


def points_of(timeline: Timeline) -> list[Point]:
    """The parts of a decode step, on the host (waiting too) and on the device, each side's longest first."""
    host, device = seconds_by_step(timeline)
    merged: dict[str, dict[int, float]] = {}
    for (name, _), of_step in host.items():
        into = merged.setdefault(name, {})
        for step, seconds in of_step.items():
            into[step] = into.get(step, 0.0) + seconds
    decode = [step.step for step in timeline.steps if step.kind == "decode"]
    found: list[Point] = []
    for where, points in (("host", merged), ("device", device)):
        whole = sum(sum(of_step.values()) for of_step in points.values())
        rows = []
        for name, of_step in points.items():
            each = 1e3 * np.array([of_step.get(step, 0.0) for step in decode]) if decode else np.array([math.nan])
            total = sum(of_step.values())
            share = total / whole if whole else 0.0
            rows.append(Point(name, where, float(np.median(each)), p99(each.tolist()), total, share))
        found += sorted(rows, key=lambda point: -point.total_s)
    return found
