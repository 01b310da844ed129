"""What the host, the copies and the device did, and when.

A `Timeline` is a list of spans on four lanes: "host" (Python's work), "H2D" (inputs copied to the device), "compute"
(the model's steps) and "D2H" (results copied back). All times are seconds of one clock. Step N has one span on each
device lane ("copy_in", "step", "copy_out") and one host span for each thing the host does for it: "plan", "fill",
"launch", "wait" and "commit". From the spans follow the numbers this project is about: how long the device was active,
how long it was idle, and what the host was doing in each idle gap. `save` writes a trace that https://ui.perfetto.dev
opens.
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


_new = tuple.__new__  # makes a named tuple in half the time of a call of its class


class Span(NamedTuple):
    """Something that ran on `lane` for `step` from `start` to `end` (seconds)."""

    lane: str
    name: str
    step: int
    start: float
    end: float


class Step(NamedTuple):
    """What a step was for: `kind` is "decode" or "prefill" (any prefill row in it). `tokens` excludes `wasted`.

    `rows`: how many rows it had. `context`: the tokens that a row's last query attends to, itself included, summed over
    the rows. Both are 0 where they are not known, as in older traces."""

    step: int
    kind: str
    tokens: int
    wasted: int
    rows: int = 0
    context: int = 0


@dataclass(frozen=True)
class Gap:
    """The device idle from `start` to `end` before decode step `step`; `host_s` is seconds of it by host span name."""

    step: int
    start: float
    end: float
    host_s: dict[str, float]

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True)
class Summary:
    """The numbers of one run. `device_active` and `idle` are shares from 0 to 1 over the decode steps; these two and
    `host_ms_per_step` are nan where no decode step could be measured."""

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
        """The same as plain values for JSON; None in place of nan."""
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


def idle_share(host_s: float, device_s: float) -> float:
    """The law of the synchronous loop: host and device take turns, so the device idles while the host works.

    `host_s` and `device_s` are seconds of one step. ZeroDivisionError if both are 0."""
    return host_s / (host_s + device_s)


def overlap_gain(host_s: float, device_s: float) -> float:
    """How many times as fast the asynchronous loop can be: in turns a step costs both times, overlapped the longer one.

    `host_s` and `device_s` are seconds of one step. ZeroDivisionError if both are 0."""
    return (host_s + device_s) / max(host_s, device_s)


def idle_gaps(starts, ends) -> list[tuple[int, float]]:
    """(i, seconds) for every step i that begins later than the step before it ends: for so long the device was idle.

    `starts` and `ends` are lists of seconds of successive device steps, as in `device_activity`."""
    return [(i, starts[i] - ends[i - 1]) for i in range(1, len(starts)) if starts[i] > ends[i - 1]]


def device_activity(starts, ends, counted=None) -> tuple[float, float]:
    """(active_s, period_s) of successive device steps: `starts` and `ends` are lists or arrays of seconds, in order.

    A step's period runs from the end of the step before it to its own end, so the first step has none and is left out.
    `counted` (one bool a step) says which of the others to add up; None adds up all."""
    starts, ends = np.asarray(starts, float), np.asarray(ends, float)
    counted = np.ones(len(ends), bool) if counted is None else np.asarray(counted, bool)
    counted = counted[1:]
    return float((ends - starts)[1:][counted].sum()), float(np.diff(ends)[counted].sum())


def union(starts, ends) -> tuple[np.ndarray, np.ndarray]:
    """(starts, ends) of the stretches that the intervals cover together, in order, none touching the next. `starts` and
    `ends` are arrays in any order and of any unit; an interval without length covers nothing."""
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
    """The corners (times, busy seconds up to then) of the busy time of spans given in any order, overlaps counted once.

    `np.interp(t, times, busy)` is then the busy time before t, for any number of spans and points."""
    starts, ends = union(np.asarray(starts, float), np.asarray(ends, float))
    if not len(starts):
        return np.zeros(1), np.zeros(1)
    busy = np.cumsum(ends - starts)
    return np.column_stack([starts, ends]).ravel(), np.column_stack([np.r_[0.0, busy[:-1]], busy]).ravel()


class Timeline:
    """The spans of one run. `label` names it ("sync"); `clock` says whose time it is: "host", "cuda" or "virtual"."""

    def __init__(self, label: str = "", clock: str = "host"):
        self.label = label
        self.clock = clock
        self.spans: list[Span] = []
        self.steps: list[Step] = []

    def __repr__(self) -> str:
        return f"Timeline({self.label!r}, clock={self.clock!r}, {len(self.spans)} spans, {len(self.steps)} steps)"

    def add(self, lane: str, name: str, step: int, start: float, end: float) -> None:
        """Note a span (seconds). In the hot loop: one append, nothing else."""
        self.spans.append(_new(Span, (lane, name, step, start, end)))

    def add_step(self, step: int, kind: str, tokens: int, wasted: int, rows: int = 0, context: int = 0) -> None:
        """Note, at commit, what a step was for ("decode" or "prefill"), how many tokens it gave and wasted, how many
        rows it had, and how many tokens they attended to (see `Step`)."""
        self.steps.append(_new(Step, (step, kind, tokens, wasted, rows, context)))

    @property
    def origin(self) -> float:
        """The first start of any span (seconds); 0.0 without spans."""
        return min((span.start for span in self.spans), default=0.0)

    def lane(self, lane: str) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
        """(names, steps, starts, ends) of a lane's spans by start; integers and float64 seconds."""
        spans = sorted((span for span in self.spans if span.lane == lane), key=lambda span: span.start)
        if not spans:
            return [], np.zeros(0, np.int64), np.zeros(0), np.zeros(0)
        _, names, steps, starts, ends = zip(*spans, strict=True)
        return list(names), np.array(steps, np.int64), np.array(starts, float), np.array(ends, float)

    def _decode_steps(self) -> np.ndarray:
        return np.array([step.step for step in self.steps if step.kind == "decode"], np.int64)

    def summary(self) -> Summary:
        """The run in numbers. Works on a timeline of any size, empty ones too."""
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
        """The device's idle gaps before decode steps, in order of time, with what the host was doing in each.

        They add up to the idle time behind `summary().idle`."""
        _, steps, starts, ends = self.lane("compute")
        late = np.array([i for i, _ in idle_gaps(starts.tolist(), ends.tolist())], np.int64)
        wanted = late[np.isin(steps[late], self._decode_steps())]
        steps, begins, stops = steps[wanted], ends[wanted - 1], starts[wanted]
        names, _, starts, ends = self.lane("host")
        kinds = np.array(names, object)
        host_s: list[dict[str, float]] = [{} for _ in wanted]
        for name in dict.fromkeys(names):
            times, busy = busy_curve(starts[kinds == name], ends[kinds == name])
            seconds = np.interp(stops, times, busy) - np.interp(begins, times, busy)
            for i in np.flatnonzero(seconds > 0):
                host_s[i][name] = float(seconds[i])
        return [Gap(*gap) for gap in zip(steps.tolist(), begins.tolist(), stops.tolist(), host_s, strict=True)]

    def save(self, path: str | Path) -> None:
        """Write a Chrome trace (JSON) that https://ui.perfetto.dev opens and `load` reads back exactly."""
        save_trace(path, [self])

    @classmethod
    def load(cls, path: str | Path) -> Timeline:
        """The timeline that `save` wrote. ValueError if the file holds something else."""
        timelines = load_trace(path)
        if len(timelines) != 1:
            raise ValueError(f"{path} holds {len(timelines)} timelines, expected 1: load_trace(path) gives all of them")
        return timelines[0]


def save_trace(path: str | Path, timelines: Sequence[Timeline]) -> None:
    """Write several timelines into one Chrome trace, as processes 1, 2, ..., each beginning at time 0.

    Arrows ("flow events") lead from a step's copy in to the step and on to its copy out."""
    events: list[dict[str, Any]] = []
    notes = []
    flows = itertools.count(1)  # their ids: unique over all timelines, or Perfetto would join two runs
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
            # ts and dur are microseconds for the viewer, both ends rounded alike so that neighbours still touch;
            # args keep the exact seconds for `load`.
            ts, stop = round(1e6 * (start - origin), 3), round(1e6 * (end - origin), 3)
            args = {"step": step, "start_s": start, "end_s": end}
            event = {"ph": "X", "pid": pid, "tid": tids[lane], "name": name, "cat": lane}
            events.append({**event, "ts": ts, "dur": round(stop - ts, 3), "args": args})
            if lane in LANES[1:]:
                slices.setdefault(step, {}).setdefault(lane, events[-1])
        for found in slices.values():
            if len(found) == len(LANES[1:]):
                events += _arrows([found[lane] for lane in LANES[1:]], next(flows))
    trace = {"traceEvents": events, "displayTimeUnit": "ms", "metadata": {"asyncbatch": notes}}
    Path(path).write_text(json.dumps(trace, allow_nan=False), encoding="utf-8")


def _arrows(slices: Sequence[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """The flow events `number` through the slices ("X" events) of a step; none where an arrow would lead back in time.

    A flow event belongs to the slice that is open on its thread at its time, so it stands in the middle of it: at an
    end, a neighbour that touches it could be meant as well."""
    times = [round(event["ts"] + event["dur"] / 2, 3) for event in slices]
    if times != sorted(times):
        return []
    flow = {"name": f"step {slices[0]['args']['step']}", "cat": "flow", "id": number, "bp": "e"}
    return [
        {"ph": phase, "pid": event["pid"], "tid": event["tid"], "ts": ts, **flow}
        for phase, event, ts in zip("stf", slices, times, strict=True)
    ]


def load_trace(path: str | Path) -> list[Timeline]:
    """All timelines of a file that `save` or `save_trace` wrote. ValueError if the file holds something else."""
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
