"""Latency points: the parts of a step on the host and on the device, and how long each takes.

    with record_points(batcher):
        batcher.run(requests)
    for point in points_of(batcher.timeline):  # median, p99 and share of each part of a step
        print(point)
    print(attribute(batcher.timeline))         # the idle time, by what the host was doing in it

A batcher's timeline has five host spans a step (plan, fill, launch, wait, commit). `record_points` (in
`point_recorder.py`) adds what lies inside them, on the lane "points". Spans nest, and the innermost one counts: the
time of "admit" does not include that of the "KV allocate" inside it. Calls of one kind that follow each other are drawn
as one span, from the start of the first and as long as all of them together.

`MEANING` says what each name stands for. `attribute` (in `attribution.py`) divides the idle time among these points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

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
    "waking up": "the output ids had arrived, and the host's thread had not woken up yet: the operating system",
    "copy in": "the inputs, host to device",
    "carry-over": "tokens of the step before become inputs",
    "forward": "the model",
    "sample": "choosing the next tokens",
    "step": "the whole step on the device, where its parts are not told apart (a timed device, another engine)",
    "copy out": "the output ids, device to host",
    "not begun": "the step, or its copy in, was launched, and the device had not begun it: the driver, the device",
}
OF_SPAN = {
    "plan": "schedule",
    "fill": "fill buffers",
    "launch": "step launch",
}  # a host span, less the points inside it
OF_COMMAND = {"copy_in": "copy in", "copy_out": "copy out"}
LAUNCHES = ("H2D launch", "step launch", "D2H launch")
PARTS = ("carry-over", "forward", "sample")
AFTER = ("commit", "prune", "detokenize")  # the points that come after their step; all others come before it
NOTHING, WAIT, GC, CALLBACKS, ADDED = "nothing recorded", "wait", "garbage collection", "callbacks", "added host work"
NO_REQUEST, COPY_IN, COPY_OUT, WAKING, NOT_BEGUN = "no request", "copy in", "copy out", "waking up", "not begun"


class Segment(NamedTuple):
    """From `start` to `end` (seconds) the host was at the point `name`, and at none inside it. `step` is the step that
    this was for; `after` says whether it came after that step (a commit) or before it."""

    name: str
    step: int
    start: float
    end: float
    after: bool


def host_segments(timeline: Timeline) -> list[Segment]:
    """What the host did, in order of time and without overlaps: of nested spans, the innermost one counts. ValueError
    if the timeline has dropped steps."""
    timeline.check_whole("an account by latency points")
    spans = []
    for lane, name, step, start, end in timeline.spans:
        if end > start and lane in ("host", LANE):
            spans.append((start, -end, lane == LANE, name, step))
    spans.sort()
    segments: list[Segment] = []
    stack: list[tuple[float, str, int, bool]] = []  # (end, name, step, after) of the open spans, outermost first
    at = -math.inf

    def advance_to(moment: float) -> None:
        """Add the time up to `moment` to the segments, and close the spans that end before it."""
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
        advance_to(start)
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
    advance_to(math.inf)
    return segments


@dataclass(frozen=True)
class Point:
    """A part of a step, over a whole run.

    where: "host" or "device". median_ms, p99_ms: milliseconds of it in a decode step. total_s: seconds of it in all
    steps. share: `total_s` over the total of all points on the same side."""

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
    """(host, device): the seconds of each point by step. A key of `host` is (name, whether it comes after its step), a
    key of `device` is a name."""
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
            # What a step takes beyond its parts, for reading its inputs and for the clock itself, counts as "forward".
            name = OF_COMMAND.get(name, "step" if step not in parts else "forward")
            of_step = device.setdefault(name, {})
            of_step[step] = of_step.get(step, 0.0) + max(rest, 0.0)
    return host, device


def points_of(timeline: Timeline) -> list[Point]:
    """The parts of a decode step, those of the host first (waiting is one of them), each side's longest at the top."""
    of_host, of_device = seconds_by_step(timeline)
    merged: dict[str, dict[int, float]] = {}
    for (name, _), of_step in of_host.items():
        into = merged.setdefault(name, {})
        for step, seconds in of_step.items():
            into[step] = into.get(step, 0.0) + seconds
    decode = [step.step for step in timeline.steps if step.kind == "decode"]
    points: list[Point] = []
    for where, seconds_of in (("host", merged), ("device", of_device)):
        all_s = sum(sum(of_step.values()) for of_step in seconds_of.values())
        side = []
        for name, of_step in seconds_of.items():
            each = 1e3 * np.array([of_step.get(step, 0.0) for step in decode]) if decode else np.array([math.nan])
            total = sum(of_step.values())
            share = total / all_s if all_s else 0.0
            side.append(Point(name, where, float(np.median(each)), p99(each.tolist()), total, share))
        points += sorted(side, key=lambda point: -point.total_s)
    return points
