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

import contextlib
import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from .timeline import Timeline

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
PARTS = ("carry-over", "forward", "sample")
AFTER = ("commit", "prune", "detokenize")  # points that a step pays when it is done; all others come before it
NOTHING, WAIT, GC, CALLBACKS, ADDED = "nothing recorded", "wait", "garbage collection", "callbacks", "added host work"
NO_REQUEST = "no request"
MOST_LISTED = 10


# ---- recording ------------------------------------------------------------------------------------------------------


class _Recorder:
    """Times calls and puts them on the timeline that the batcher has at that moment."""

    def __init__(self, batcher: Any):
        self.batcher, self.now = batcher, getattr(batcher.device, "now", perf_counter)
        self.step = 0
        self._name, self._start, self._sum = "", 0.0, 0.0
        self._turn_ended: tuple[Timeline, float] | None = None
        self._collecting = 0.0

    def flush(self) -> None:
        if self._name:  # (a launch that failed has no end)
            self.batcher.timeline.add(LANE, self._name, self.step, self._start, self._start + self._sum)
            self._name = ""

    def timed(self, name: str, function: Callable, alone: bool = False) -> Callable:
        """`function`, each of whose calls is noted as `name`. alone: a call never goes into one span with others."""

        def wrapper(*arguments, **options):
            if self._name != name:
                self.flush()
            start = self.now()
            try:
                return function(*arguments, **options)
            finally:
                end = self.now()
                if self._name != name or alone:
                    self.flush()
                    self._name, self._start, self._sum = name, start, 0.0
                self._sum += end - start

        return wrapper

    def begins(self, name: str, function: Callable, last: bool = False) -> Callable:
        """`function`, whose calls are part of `name`, which goes on until another point begins. For what follows each
        other without a break, the launches: the clock is asked once a point, not twice a call. last: `name` ends with
        this call."""

        def wrapper(*arguments):
            if self._name != name:
                moment = self.now()
                if self._name in LAUNCHES:
                    self._sum = moment - self._start
                self.flush()
                self._name, self._start, self._sum = name, moment, 0.0
            result = function(*arguments)
            if last:
                self._sum = self.now() - self._start
                self.flush()
            return result

        return wrapper

    def plan(self, function: Callable) -> Callable:
        scheduler = self.batcher.scheduler
        burnt_s = self.batcher.host_work_s

        def plan():
            self.flush()
            self.step = scheduler.num_steps
            made = function()
            if burnt_s and made is not None:  # right after this, in the same host span
                self.flush()
                start = self.now()
                self.batcher.timeline.add(LANE, ADDED, self.step, start, start + burnt_s)
            return made

        return plan

    def commit(self, function: Callable) -> Callable:
        def commit(plan, token_ids):
            self.flush()
            self.step = plan.step
            return function(plan, token_ids)

        return commit

    def turn(self, function: Callable) -> Callable:
        """The time between two turns of the loop is the caller's, as long as the run goes on."""

        def step() -> bool:
            timeline, start = self.batcher.timeline, self.now()
            if self._turn_ended is not None and self._turn_ended[0] is timeline:
                self.flush()
                timeline.add(LANE, CALLBACKS, self.step, self._turn_ended[1], start)
            served = True
            try:
                served = function()
                return served
            finally:
                if not served:  # nothing to do: a look at the empty queue, maybe long after the timeline's last step
                    self._name = ""
                self.flush()
                self._turn_ended = timeline, self.now()

        return step

    def spans(self, function: Callable) -> Callable:
        """After a step, its parts on the device: one after the other, from its start on."""
        parts_of = getattr(self.batcher.device, "parts", None)

        def spans(slot: int):
            found = function(slot)
            if parts_of is not None:
                start = float(found[1, 0])
                for name, seconds in zip(PARTS, parts_of(slot), strict=True):
                    if seconds > 0:
                        self.batcher.timeline.add(DEVICE_LANE, name, self.step, start, start + float(seconds))
                        start += float(seconds)
            return found

        return spans

    def collected(self, phase: str, _: dict) -> None:
        if phase == "start":
            self._collecting = self.now()
        elif self._collecting:
            self.batcher.timeline.add(LANE, GC, self.step, self._collecting, self.now())


class _TimedTokenizer:
    """The caller's tokenizer, with a `decode` that is timed; the caller's own object is not touched."""

    def __init__(self, tokenizer: Any, recorder: _Recorder):
        self._tokenizer, self.decode = tokenizer, recorder.timed("detokenize", tokenizer.decode)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


@contextlib.contextmanager
def record_points(batcher: Any) -> Iterator[None]:
    """Within it, every run of the batcher has its latency points on the timeline's lanes "points" and "device points".

    For this package's batchers. Of any other that has a `timeline`, only garbage collections are noted."""
    recorder = _Recorder(batcher)
    undo: list[tuple[Any, str, Any, bool]] = []

    def replace(owner: Any, name: str, value: Any) -> None:
        undo.append((owner, name, getattr(owner, name), name in vars(owner)))
        setattr(owner, name, value)

    def time(owner: Any, name: str, point: str, **options: Any) -> None:
        replace(owner, name, recorder.timed(point, getattr(owner, name), **options))

    if hasattr(batcher, "scheduler"):
        scheduler, kv, device = batcher.scheduler, batcher.kv, batcher.device
        replace(scheduler, "plan", recorder.plan(scheduler.plan))
        replace(scheduler, "commit", recorder.commit(scheduler.commit))
        time(scheduler, "_prefill_rows", "admit", alone=True)
        time(kv, "_grow", "KV allocate")
        time(kv, "prune", "prune")
        for stream, point in zip(device.streams, LAUNCHES, strict=True):
            for method in ("wait_event", "launch", "record_event"):
                last = point == LAUNCHES[-1] and method == "record_event"
                replace(stream, method, recorder.begins(point, getattr(stream, method), last))
        replace(device, "spans", recorder.spans(device.spans))
        replace(batcher, "step", recorder.turn(batcher.step))
        if batcher.tokenizer is not None:
            replace(batcher, "tokenizer", _TimedTokenizer(batcher.tokenizer, recorder))
    # On the virtual clock a collection takes no time, and asking for the time, which lets commands take effect, is not
    # allowed in the middle of anything.
    collected = [recorder.collected] if getattr(batcher, "clock", None) is None else []
    gc.callbacks += collected
    try:
        yield
    finally:
        for callback in collected:
            gc.callbacks.remove(callback)
        recorder.flush()
        for owner, name, value, own in reversed(undo):
            if own:
                setattr(owner, name, value)
            else:
                delattr(owner, name)


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
            rows.append(Point(name, where, float(np.median(each)), float(np.percentile(each, 99)), total, share))
        found += sorted(rows, key=lambda point: -point.total_s)
    return found
