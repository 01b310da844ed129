"""What the host, the copies and the device did, and when.

A `Timeline` is a list of spans on four lanes: "host" (Python's work), "H2D" (inputs copied to the device), "compute"
(the model's steps) and "D2H" (results copied back). All times are seconds on one clock. Step N has one span on each
lane of the device ("copy_in", "step", "copy_out"), and on the host one for each thing that the host does for it:
"plan", "fill", "launch", "wait" and "commit".

The numbers that this project is about follow from the spans: how long the device was active, how long it was idle, and
what the host was doing in each idle gap. `Timeline.save` writes a trace that https://ui.perfetto.dev opens.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

LANES = ("host", "H2D", "compute", "D2H")

_new = tuple.__new__  # makes a named tuple in half the time that a call of its class takes


class Span(NamedTuple):
    """Something that ran on `lane` for `step` from `start` to `end` (seconds)."""

    lane: str
    name: str
    step: int
    start: float
    end: float


class Step(NamedTuple):
    """What a step did. kind: "decode" or "prefill". tokens: how many it generated
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
    median. These three are nan if no decode step could be measured.
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

    The period of a step goes from the end of the step before it to its own end. The first step has no period and is
    left out of both sums.
    starts, ends: lists or arrays of seconds, one for each step, in order. counted: one bool for each step, whether it
    is added up (the first never is); None adds up all others."""
    starts, ends = np.asarray(starts, float), np.asarray(ends, float)
    counted = np.ones(len(ends), bool) if counted is None else np.asarray(counted, bool)
    counted = counted[1:]
    return float((ends - starts)[1:][counted].sum()), float(np.diff(ends)[counted].sum())


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


class Timeline:
    """The spans of one run. label: its name, such as "sync". clock: whose time it is, "host", "cuda" or "virtual"."""

    def __init__(self, label: str = "", clock: str = "host"):
        self.label = label
        self.clock = clock
        self.spans: list[Span] = []
        self.steps: list[Step] = []

    def __repr__(self) -> str:
        return f"Timeline({self.label!r}, clock={self.clock!r}, {len(self.spans)} spans, {len(self.steps)} steps)"

    def add(self, lane: str, name: str, step: int, start: float, end: float) -> None:
        """Note a span; `start` and `end` are seconds. The hot loop calls this, so it is one append and nothing else."""
        self.spans.append(_new(Span, (lane, name, step, start, end)))

    def add_step(self, step: int, kind: str, tokens: int, wasted: int, rows: int = 0, context: int = 0) -> None:
        """Note what a step did, once it is committed. `Step` says what the arguments mean."""
        self.steps.append(_new(Step, (step, kind, tokens, wasted, rows, context)))

    @property
    def origin(self) -> float:
        """When the first span starts (seconds); 0.0 without spans."""
        return min((span.start for span in self.spans), default=0.0)

    def lane(self, lane: str) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
        """The spans of a lane, in the order of their starts: (names, steps, starts, ends), a list of texts, an int64
        array, and two float64 arrays of seconds."""
        spans = sorted((span for span in self.spans if span.lane == lane), key=lambda span: span.start)
        if not spans:
            return [], np.zeros(0, np.int64), np.zeros(0), np.zeros(0)
        _, names, steps, starts, ends = zip(*spans, strict=True)
        return list(names), np.array(steps, np.int64), np.array(starts, float), np.array(ends, float)

    def _decode_steps(self) -> np.ndarray:
        return np.array([step.step for step in self.steps if step.kind == "decode"], np.int64)

    def summary(self) -> Summary:
        """The run in numbers. An empty timeline has a summary too."""
        decode = self._decode_steps()
        _, steps, starts, ends = self.lane("compute")
        active_s, period_s = device_activity(starts, ends, np.isin(steps, decode))
        active = min(1.0, active_s / period_s) if period_s > 0 else math.nan
        names, steps, starts, ends = self.lane("host")
        work = np.isin(steps, decode) & np.array([name != "wait" for name in names], bool)
        _, which = np.unique(steps[work], return_inverse=True)
        host_s = np.bincount(which, (ends - starts)[work])
        wall_s = max((span.end for span in self.spans), default=0.0) - self.origin
        tokens = sum(step.tokens for step in self.steps)
        return Summary(
            wall_s=wall_s,
            tokens=tokens,
            tokens_per_s=tokens / wall_s if wall_s > 0 else 0.0,
            steps=len(self.steps),
            decode_steps=len(decode),
            device_active=active,
            idle=1.0 - active,
            host_ms_per_step=1e3 * float(np.median(host_s)) if len(host_s) else math.nan,
            wasted_tokens=sum(step.wasted for step in self.steps),
        )

    def gaps(self) -> list[Gap]:
        """The idle gaps of the device before decode steps, in order of time, with what the host was doing in each.

        Together they are as long as the idle time in `summary().idle`."""
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
    """Write several timelines into one Chrome trace: as processes 1, 2, ..., each of which begins at time 0.

    Arrows ("flow events") lead from the copy in of a step to the step, and on to its copy out."""
    events: list[dict[str, Any]] = []
    notes = []
    flows = itertools.count(1)  # numbers of arrows, not used twice in a file: Perfetto would join two runs
    for pid, timeline in enumerate(timelines, 1):
        origin = timeline.origin
        notes.append({"pid": pid, "label": timeline.label, "clock": timeline.clock, "origin": origin})
        notes[-1]["steps"] = [list(step) for step in timeline.steps]
        title = f"{timeline.label or 'timeline'} ({timeline.clock} clock)"
        events.append({"ph": "M", "pid": pid, "name": "process_name", "args": {"name": title}})
        events.append({"ph": "M", "pid": pid, "name": "process_sort_index", "args": {"sort_index": pid}})
        lanes = dict.fromkeys([*LANES, *(span.lane for span in timeline.spans)])
        tids = {lane: 100 * pid + i for i, lane in enumerate(lanes)}
        for lane, tid in tids.items():
            where = {"ph": "M", "pid": pid, "tid": tid}
            events.append({**where, "name": "thread_name", "args": {"name": lane}})
            events.append({**where, "name": "thread_sort_index", "args": {"sort_index": tid}})
        slices: dict[int, dict[str, dict[str, Any]]] = {}  # step -> device lane -> its first event
        for lane, name, step, start, end in timeline.spans:
            # ts and dur are microseconds, for the viewer. Both ends are rounded alike, so that neighbours still touch.
            # args keeps the exact seconds, for `load`.
            ts, stop = round(1e6 * (start - origin), 3), round(1e6 * (end - origin), 3)
            args = {"step": step, "start_s": start, "end_s": end}
            event = {"ph": "X", "pid": pid, "tid": tids[lane], "name": name, "cat": lane}
            events.append({**event, "ts": ts, "dur": round(stop - ts, 3), "args": args})
            if lane in LANES[1:]:
                slices.setdefault(step, {}).setdefault(lane, events[-1])
        for of_step in slices.values():
            if len(of_step) == len(LANES[1:]):
                events += _arrows([of_step[lane] for lane in LANES[1:]], next(flows))
    trace = {"traceEvents": events, "displayTimeUnit": "ms", "metadata": {"asyncbatch": notes}}
    Path(path).write_text(json.dumps(trace, allow_nan=False), encoding="utf-8")


def _arrows(slices: Sequence[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """The arrows through the slices ("X" events) of a step, as flow events with this number. None at all if one of them
    would lead back in time.

    The viewer ties a flow event to the slice that is open on its thread at that time. So each stands in the middle of
    its slice: at one of its ends, it could be tied to the neighbour that touches it."""
    times = [round(event["ts"] + event["dur"] / 2, 3) for event in slices]
    if times != sorted(times):
        return []
    flow = {"name": f"step {slices[0]['args']['step']}", "cat": "flow", "id": number, "bp": "e"}
    return [
        {"ph": phase, "pid": event["pid"], "tid": event["tid"], "ts": ts, **flow}
        for phase, event, ts in zip("stf", slices, times, strict=True)
    ]


def load_trace(path: str | Path) -> list[Timeline]:
    """All timelines of a file that `Timeline.save` or `save_trace` wrote. ValueError if the file holds anything
    else."""
    expected = "expected a Chrome trace written by Timeline.save (JSON with traceEvents and metadata.asyncbatch)"
    try:
        trace = json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); {expected}") from None
    if not isinstance(trace, dict):
        raise ValueError(f"{path} holds a JSON {type(trace).__name__}; {expected}")
    try:
        timelines = {}
        for note in trace["metadata"]["asyncbatch"]:
            timeline = timelines[note["pid"]] = Timeline(note["label"], note["clock"])
            timeline.steps = [Step(*step) for step in note["steps"]]
        for event in trace["traceEvents"]:
            if event["ph"] == "X":
                args = event["args"]
                span = Span(event["cat"], event["name"], args["step"], args["start_s"], args["end_s"])
                timelines[event["pid"]].spans.append(span)
    except (KeyError, TypeError) as error:
        problem = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is JSON with the keys {sorted(trace)}, but {problem}; {expected}") from None
    return list(timelines.values())
