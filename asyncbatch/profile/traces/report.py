"""A profiler's trace of any engine: how idle was its GPU, step by step and gap by gap?

    python -m asyncbatch.profile --trace vllm.pt.trace.json.gz

`read_trace` takes what `torch.profiler` exports (Chrome trace JSON, also .gz), finds the compute stream and where each
step begins and ends, and says what the host was doing in each gap of the device. The file is read event by event (see
`trace_events`), so a large one needs little memory: 500 MB with 2.5 million events took 0.6 GB.

Two methods, as everywhere in this project. **Step active** counts the compute stream as active from the first to the
last kernel of a step, over the time from the end of the first step to the end of the last, as
`timeline.device_activity` does. **Kernel busy** is the union of all kernel, copy and memset intervals of the device,
over a window.

Times are whole nanoseconds while anything is added up, and seconds in what is returned; 0 is the beginning of the first
kernel or copy of the device.

Tested on made-up traces (tests/support/make_trace.py), on a CPU-only trace of torch.profiler itself, on excerpts of
published CUDA traces, old and new, and on traces of this project's own GPU runs (tests/profile/traces).
"""

from __future__ import annotations

import itertools
import math
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...timeline import Gap, Timeline, device_activity, union
from .events import (
    ANNOTATION,
    COPY,
    D2H,
    H2D,
    KERNEL,
    PYTHON,
    RUNTIME,
    Events,
    Names,
    TraceError,
    gpu_name,
    read_events,
)
from .steps import Found, Work, find_steps, pattern_of, repeated

__all__ = ["GraphLaunches", "Stream", "TraceError", "TraceGap", "TraceReport", "busy_in", "read_trace"]

SCHEMA = 1
NOTHING = "nothing recorded"
MOST_HOST_PIECES = 100_000  # of the host lane of `timeline`
GRAPH_LAUNCH = re.compile(r"(cuda|cu|hip)GraphLaunch")
WAITS = re.compile(r"Synchronize|(cuda|hip)Memcpy$")
Table = dict[str, np.ndarray]  # columns of a table of events by name


class Stream(NamedTuple):
    """One stream of a device: seconds in which something ran on it, and how many kernels and copies."""

    device: int
    stream: int
    busy_s: float
    kernels: int
    copies: int


class GraphLaunches(NamedTuple):
    """How many graphs the host launched, and how many of the device's kernels came from them, by correlation id."""

    calls: int
    kernels: int


@dataclass(frozen=True)
class TraceGap(Gap):
    """The device idle from `start` to `end` (seconds): before step `step`, or in the middle of it where `inside`.

    `host_s`: seconds by what the launching host thread was doing; they add up to the gap."""

    inside: bool = False

    @property
    def ms(self) -> float:
        return 1e3 * self.seconds

    @property
    def cause(self) -> str:
        """What took most of it."""
        return max(self.host_s, key=self.host_s.__getitem__)


# ---- intervals, in whole nanoseconds ------------------------------------------------------------------------------


def outside(starts: np.ndarray, ends: np.ndarray, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
    """What of `low` to `high` the stretches that `union` gave leave free."""
    begins, stops = np.maximum(np.r_[low, ends], low), np.minimum(np.r_[starts, high], high)
    free = stops > begins
    return begins[free], stops[free]


def covered_before(points: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """How much of the stretches (in order, not overlapping) lies before each point."""
    if not len(starts):
        return np.zeros(len(points), np.int64)
    total = np.r_[0, np.cumsum(ends - starts)]
    which = np.searchsorted(starts, points, "right")
    last = ends[np.maximum(which - 1, 0)]
    return total[which] - np.where(which > 0, np.maximum(last - points, 0), 0)


def intersections(a: tuple, b: tuple) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(starts, ends, which of a, which of b): where the stretches `a` and `b` overlap. Both are (starts, ends), in
    order and not overlapping among themselves."""
    (a_starts, a_ends), (b_starts, b_ends) = a, b
    cuts = np.unique(np.concatenate([a_starts, a_ends, b_starts, b_ends]))
    begins, stops = cuts[:-1], cuts[1:]
    if not len(a_starts) or not len(b_starts) or not len(begins):
        none = np.zeros(0, np.int64)
        return none, none, none, none
    in_a = np.searchsorted(a_starts, begins, "right") - 1
    in_b = np.searchsorted(b_starts, begins, "right") - 1
    both = (in_a >= 0) & (in_b >= 0) & (begins < a_ends[in_a]) & (begins < b_ends[in_b])
    return begins[both], stops[both], in_a[both], in_b[both]


def innermost(starts: np.ndarray, ends: np.ndarray, names: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(starts, ends, names) of the stretches in which the same event is the innermost: of those that run, the one that
    began last. Given in order of start, outer events first."""
    found = array("q"), array("q"), array("q")
    begins, stops, inner = found
    stack: list[tuple[int, int]] = []  # (end, name), the innermost last
    now = 0
    last = int(ends.max()) if len(ends) else 0
    rows = zip([*starts.tolist(), last], [*ends.tolist(), last], [*names.tolist(), -1], strict=True)
    for start, end, name in rows:  # the last one only brings what is on the stack to its end
        while stack and now < start:
            top_end, top_name = stack[-1]
            stop = min(top_end, start)
            if now < stop:
                begins.append(now)
                stops.append(stop)
                inner.append(top_name)
                now = stop
            if top_end <= now:
                stack.pop()
        now = start
        stack.append((end, name))
    return tuple(np.array(column, np.int64) for column in found)  # type: ignore[return-value]


# ---- the report ---------------------------------------------------------------------------------------------------


class Gaps(Sequence):
    """The idle gaps of a trace in order of time, `TraceGap`s made when asked for: a trace can have millions."""

    def __init__(self, starts, ends, steps, inside, causes: list[str], pieces: tuple[np.ndarray, ...]):
        self.ns = ends - starts
        self.steps, self.inside, self.causes = steps, inside, causes
        self._starts, self._ends = starts, ends
        gap, self._cause, self._ns = pieces  # for each gap its causes, in order of the gaps
        self._first = np.searchsorted(gap, np.arange(len(starts) + 1))
        self._gap = gap

    def __len__(self) -> int:
        return len(self.ns)

    def __getitem__(self, at):
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        at = range(len(self))[at]
        part = slice(self._first[at], self._first[at + 1])
        host_s = {
            self.causes[cause]: 1e-9 * ns
            for cause, ns in zip(self._cause[part].tolist(), self._ns[part].tolist(), strict=True)
        }
        bounds = 1e-9 * float(self._starts[at]), 1e-9 * float(self._ends[at])
        return TraceGap(int(self.steps[at]), *bounds, host_s, bool(self.inside[at]))

    def ns_by_cause(self, inside: bool | None = None) -> dict[str, int]:
        """Nanoseconds of all gaps by cause, the largest first; `inside` takes those inside, or between, steps only."""
        wanted = np.ones(len(self._gap), bool) if inside is None else self.inside[self._gap] == inside
        totals = np.zeros(len(self.causes), np.int64)
        np.add.at(totals, self._cause[wanted], self._ns[wanted])
        order = sorted(np.flatnonzero(totals), key=lambda cause: (-totals[cause], self.causes[cause]))
        return {self.causes[cause]: int(totals[cause]) for cause in order}

    def longest(self, count: int) -> list[TraceGap]:
        order = np.lexsort((self._starts, -self.ns))[:count]
        return [self[int(at)] for at in order]


@dataclass(eq=False, repr=False)
class TraceReport:
    """How idle the GPU of a trace was. Times are seconds from the first kernel or copy of `device`.

    `streams`: a `Stream` for each stream of each device of the file. `compute_stream`: the one of `device` with most
    kernel time. `steps`: float64 [N, 2], start and end of each step on it; `how_steps` says how they were found.
    `step_active`: share of the time from the end of the first step to the end of the last in which a step ran, None
    with fewer than two steps. `kernel_busy`: share of `window_s`, from the first to the last event of the device, in
    which any kernel, copy or memset ran on it. `kernel_busy_in_steps`: the same share over the time of `step_active`.
    `graph_launches`: None where the trace has no runtime events. `gaps`: see `Gaps`. Between two steps a gap is all
    the time from the end of the one to the start of the other, so that these add up to the idle time behind
    `step_active`. Inside a step a gap is time in which nothing runs on the device. `notes`: what else a reader must
    know."""

    label: str
    device: int
    gpu: str | None
    streams: list[Stream]
    compute_stream: int
    steps: np.ndarray
    how_steps: str
    kernel_busy: float
    kernel_busy_in_steps: float | None
    step_active: float | None
    window_s: float
    num_events: int
    num_kernels: int
    num_copies: int
    graph_launches: GraphLaunches | None
    gaps: Gaps
    notes: list[str]
    _busy: tuple[np.ndarray, np.ndarray]  # nanoseconds, as all that begins with _ but the annotations
    _copies: dict[str, tuple[np.ndarray, np.ndarray]]
    _host: tuple[np.ndarray, np.ndarray, np.ndarray]  # starts, ends, is a wait: events of the launching thread
    _annotations: dict[str, np.ndarray]

    def __repr__(self) -> str:
        return f"<TraceReport: {self.label}, {len(self.steps)} steps, {self.num_kernels} kernels>"

    @cached_property
    def idle_s(self) -> dict[str, float]:
        """Seconds idle, "between steps" and "inside steps": what the gaps add up to."""
        inside = int(self.gaps.ns[self.gaps.inside].sum())
        return {"between steps": 1e-9 * (int(self.gaps.ns.sum()) - inside), "inside steps": 1e-9 * inside}

    def idle_by_cause(self, inside: bool | None = None) -> dict[str, float]:
        """Seconds of the gaps by what the host was doing, the largest first; `inside` True or False: of those only."""
        return {cause: 1e-9 * ns for cause, ns in self.gaps.ns_by_cause(inside).items()}

    def longest(self, count: int = 10) -> list[TraceGap]:
        """The `count` longest gaps, the longest first."""
        return self.gaps.longest(count)

    def annotation(self, name: str) -> np.ndarray:
        """float64 [N, 2]: start and end of each user annotation of that name on the host, to be given to `busy_in`."""
        return self._annotations.get(name, np.zeros((0, 2)))

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values for JSON, with `schema` (a number). Seconds in keys with `_s`, milliseconds in
        keys with `ms`, shares from 0 to 1; null where something is not in the trace.

        `steps`: count, how, and the median and 99th percentile of their length and of the period from end to end.
        `idle`: for "between_steps" and "inside_steps" the seconds `s` and `by_cause`. `longest_gaps`: twenty."""
        lengths, periods = 1e3 * (self.steps[:, 1] - self.steps[:, 0]), 1e3 * np.diff(self.steps[:, 1])
        steps = {"count": len(self.steps), "how": self.how_steps}
        for key, values in (("ms", lengths), ("period_ms", periods)):
            steps[f"{key}_median"] = float(np.median(values)) if len(values) else None
            steps[f"{key}_p99"] = float(np.percentile(values, 99)) if len(values) else None
        idle = {
            key.replace(" ", "_"): {"s": seconds, "by_cause": self.idle_by_cause(key == "inside steps")}
            for key, seconds in self.idle_s.items()
        }
        return {
            "schema": SCHEMA,
            "trace": self.label,
            "device": self.device,
            "gpu": self.gpu,
            "streams": [stream._asdict() for stream in self.streams],
            "compute_stream": self.compute_stream,
            "window_s": self.window_s,
            "kernel_busy": self.kernel_busy,
            "kernel_busy_in_steps": self.kernel_busy_in_steps,
            "step_active": self.step_active,
            "events": self.num_events,
            "kernels": self.num_kernels,
            "copies": self.num_copies,
            "graph_launches": self.graph_launches and self.graph_launches._asdict(),
            "steps": steps,
            "idle": idle,
            "longest_gaps": [
                {"step": gap.step, "inside": gap.inside, "start_s": gap.start, "ms": gap.ms, "cause": gap.cause}
                for gap in self.longest(20)
            ],
            "notes": self.notes,
        }

    def __str__(self) -> str:
        return "\n".join(_lines(self))

    def timeline(self) -> Timeline:
        """The steps, copies and host work as a `Timeline`, to plot: lanes host, H2D, compute, D2H.

        Every step counts as "decode", so that its summary has the `step_active` of this report. The host lane is the
        launching thread: "wait" is a call that synchronizes, "work" anything else that is recorded. Where that would be
        more than 100,000 pieces, the shortest pauses between them are closed."""
        timeline = Timeline(self.label, "cuda")
        starts, ends = self.steps[:, 0], self.steps[:, 1]
        for number, (start, end) in enumerate(self.steps.tolist()):
            timeline.add("compute", "step", number, start, end)
            timeline.add_step(number, "decode", 0, 0)
        last = len(self.steps) - 1
        for lane, name, side in (("H2D", "copy_in", "left"), ("D2H", "copy_out", "right")):
            begins, stops = (1e-9 * column for column in self._copies[lane])
            # Copied in for the step that begins after it; copied out from the last one that began before it.
            near = np.searchsorted(starts, begins, side) - (lane == "D2H")
            for number, start, end in zip(np.clip(near, 0, last), begins, stops, strict=True):
                timeline.add(lane, name, int(number), float(start), float(end))
        begins, stops, waits = self._host
        pieces = {"wait": union(begins[waits], stops[waits])}
        work = union(begins[~waits], stops[~waits])
        if len(work[0]):
            work = intersections(work, outside(*pieces["wait"], work[0][0], work[1][-1]))[:2]
        pieces["work"] = _at_most(MOST_HOST_PIECES, *work)
        for name, (begins, stops) in pieces.items():
            near = np.clip(np.searchsorted(ends, 1e-9 * begins, "right"), 0, last)
            for number, start, end in zip(near.tolist(), begins.tolist(), stops.tolist(), strict=True):
                timeline.add("host", name, number, 1e-9 * start, 1e-9 * end)
        return timeline


def _at_most(most: int, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The stretches, with the shortest pauses between them closed until there are at most so many."""
    if len(starts) <= most:
        return starts, ends
    pauses = starts[1:] - ends[:-1]
    kept = pauses > np.partition(pauses, len(pauses) - most)[len(pauses) - most]
    return starts[np.r_[True, kept]], ends[np.r_[kept, True]]


def _plain(text: str, longest: int = 80) -> str:
    """A name of the file as text for a terminal: no control characters, not too long."""
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return text if len(text) <= longest else text[: longest - 3] + "..."


def facts(report: TraceReport) -> Iterator[tuple[str, str]]:
    """What the trace tells in one number or line each, as (what, text)."""

    def share(value: float | None) -> str:
        return "not measured" if value is None else f"{100 * value:.2f} %"

    others = len(report.streams) - 1
    yield "device", f"{report.device}{f' ({report.gpu})' if report.gpu else ''}"
    yield "compute stream", f"{report.compute_stream}" + (f", one of {others + 1}" if others else "")
    yield "window", f"{report.window_s:.6g} s, {report.num_kernels} kernels, {report.num_copies} copies"
    if report.graph_launches is None:
        yield "graph launches", "not known: the trace has no runtime events"
    elif report.graph_launches.calls and not report.graph_launches.kernels:
        yield "graph launches", f"{report.graph_launches.calls}, but none of their kernels is in the trace"
    else:
        calls, kernels = report.graph_launches
        yield "graph launches", f"{calls}, with {kernels} of the kernels" if calls else "none"
    yield "steps", f"{len(report.steps)}: {report.how_steps}"
    steps = report.as_dict()["steps"]
    if steps["ms_median"] is not None:
        yield "ms a step", f"{steps['ms_median']:.3f} (median), {steps['ms_p99']:.3f} (99th percentile)"
    active = report.step_active
    yield "step active", share(active) + (f", idle {100 * (1 - active):.2f} %" if active is not None else "")
    yield "kernel busy", f"{share(report.kernel_busy_in_steps)} over these steps, {share(report.kernel_busy)} over all"


def _lines(report: TraceReport) -> Iterator[str]:
    notes = (("note", note) for note in report.notes)
    for label, text in itertools.chain([("trace", report.label)], facts(report), notes):
        yield f"{label:<16}{_plain(text, 300 if label in ('steps', 'note') else 80)}"
    for where, seconds in report.idle_s.items():
        if seconds:
            yield ""
            yield f"idle {where}: {1e3 * seconds:.3f} ms, by what the host was doing"
            causes = list(report.idle_by_cause(where == "inside steps").items())
            rest = sum(value for _, value in causes[8:])
            causes = causes[:8] + ([(f"{len(causes) - 8} more", rest)] if rest else [])
            yield from (
                f"{1e3 * value:>12.3f} ms {100 * value / seconds:>6.1f} %  {_plain(name)}" for name, value in causes
            )
    longest = [gap for gap in report.longest(5) if gap.seconds > 0]
    if longest:
        yield ""
        yield "longest gaps"
        for gap in longest:
            where = "inside" if gap.inside else "before"
            yield f"{gap.ms:>12.3f} ms  {where} step {gap.step}, at {gap.start:.6f} s: {_plain(gap.cause)}"


def read_trace(path: str | os.PathLike, progress: bool = False) -> TraceReport:
    """The report on a trace file. `progress` shows a bar on stderr for files larger than 20 MB.

    TraceError, with one line that says what was found, for a file that cannot be read, is no JSON, is cut off, or has
    no events or none of a device. Of several devices the one with most kernel time is reported, and a note says so."""
    path = Path(path)
    events = read_events(path, progress)
    report = report_on(path.name, events)
    report.gpu = gpu_name(path, report.device)
    return report


def report_on(label: str, events: Events) -> TraceReport:
    """The report on events that hold at least one kernel."""
    device, host, runtime, on_gpu, names = events.tables()
    notes = [f"{events.unusable} events without a usable time were left out."] if events.unusable else []
    streams = _streams(device)
    number, several = _busiest(device["device"], _kernel_time(device))
    if several > 1:
        notes.append(f"{several} devices are in the trace: {number} is reported, the one with most kernel time.")
    device = _one_device(device, number)
    origin = int(device["start"][0])
    for table in (device, host, runtime, on_gpu):
        for key in table.keys() & {"start", "end"}:
            table[key] = table[key] - origin
    kinds, busy, window = device["kind"], union(device["start"], device["end"]), int(device["end"].max())
    compute, _ = _busiest(device["stream"], _kernel_time(device))
    launches = _find_launches(device, runtime, names)
    if launches is not None and launches.calls and not launches.kernels:
        notes.append("Graphs were launched, and none of their kernels is in the trace: kernel busy is too low.")
    found = _find_steps(device, compute, host, _rows(on_gpu, on_gpu["device"] == number), names)
    notes += [found.note] if found.note else []
    thread = _launching_thread(device, compute, host)
    own = _in_order(_rows(host, host["thread"] == thread))
    is_copy = {"H2D": kinds == H2D, "D2H": kinds == D2H}
    report = TraceReport(
        label=label,
        device=number,
        gpu=None,
        streams=streams,
        compute_stream=compute,
        steps=1e-9 * found.steps,
        how_steps=found.how,
        kernel_busy=_busy_share(busy, 0, window),
        kernel_busy_in_steps=None,
        step_active=None,
        window_s=1e-9 * window,
        num_events=events.count,
        num_kernels=int((kinds == KERNEL).sum()),
        num_copies=int(np.isin(kinds, (COPY, H2D, D2H)).sum()),
        graph_launches=launches,
        gaps=_gaps(found.steps, busy, own, names),
        notes=notes,
        _busy=busy,
        _copies={lane: (device["start"][mask], device["end"][mask]) for lane, mask in is_copy.items()},
        _host=(own["start"], own["end"], (own["kind"] == RUNTIME) & _matching(WAITS, names)[own["name"]]),
        _annotations=_by_name(_rows(host, host["kind"] == ANNOTATION), names),
    )
    begin, end = int(found.steps[0, 1]), int(found.steps[-1, 1])  # the first step's period is not known
    if end > begin:
        active, _ = device_activity(found.steps[:, 0], found.steps[:, 1])
        report.step_active = active / (end - begin)
        report.kernel_busy_in_steps = _busy_share(busy, begin, end)
        notes += _difference(report, begin, end)
    return report


def _difference(report: TraceReport, begin: int, end: int) -> list[str]:
    """A note where the two methods differ by more than two points, with what makes the difference."""
    assert report.step_active is not None
    assert report.kernel_busy_in_steps is not None
    points = 100 * (report.step_active - report.kernel_busy_in_steps)
    if abs(points) <= 2:
        return []
    inside = report.gaps.inside & (report.gaps.steps > 0)
    empty = 100 * int(report.gaps.ns[inside].sum()) / (end - begin)
    parts = (empty, "nothing runs inside a step"), (empty - points, "a copy or another stream runs between steps")
    said = " and ".join(f"in {share:.1f} % of the time {what}" for share, what in parts if share >= 0.05)
    return [f"Step active and kernel busy differ by {abs(points):.1f} points: {said}."]


def _rows(table: Table, which: np.ndarray) -> Table:
    return {key: column[which] for key, column in table.items()}


def _kernel_time(device: Table) -> np.ndarray:
    return np.where(device["kind"] == KERNEL, device["end"] - device["start"], 0)


def _one_device(device: Table, number: int) -> Table:
    """The events of one device, in an order that does not depend on the file."""
    own = _rows(device, device["device"] == number)
    return _rows(own, np.lexsort([own[key] for key in ("stream", "kind", "name", "correlation", "end", "start")]))


def _busiest(which: np.ndarray, time: np.ndarray) -> tuple[int, int]:
    """The value of `which` with most `time`, the smaller one of two alike; and how many values have any."""
    values, inverse = np.unique(which, return_inverse=True)
    totals = np.zeros(len(values), np.int64)
    np.add.at(totals, inverse, time)
    return int(values[totals.argmax()]), int((totals > 0).sum())


def _matching(pattern: re.Pattern, names: list[str]) -> np.ndarray:
    return np.array([bool(pattern.search(name)) for name in names], bool)


def _find_launches(device: Table, runtime: Table, names: list[str]) -> GraphLaunches | None:
    """Give each device event the call that launched it: the columns `launched`, and if so `launch` and `thread`; and
    `is_graph`. None where the trace has no runtime events."""
    ids, count = device["correlation"], len(runtime["correlation"])
    order = np.lexsort([runtime[key] for key in ("thread", "name", "start", "correlation")])
    at = np.minimum(np.searchsorted(runtime["correlation"][order], ids), max(count - 1, 0))
    call = order[at] if count else at
    device["launched"] = (ids > 0) & (runtime["correlation"][call] == ids) if count else np.zeros(len(ids), bool)
    for column, key in (("launch", "start"), ("thread", "thread")):
        device[column] = runtime[key][call] if count else np.zeros(len(ids), np.int64)
    if not count:  # then several kernels of one correlation id can only have come from a graph
        _, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
        device["is_graph"] = (counts[inverse] > 1) & (ids > 0)
        return None
    is_graph = _matching(GRAPH_LAUNCH, names)[runtime["name"]]
    device["is_graph"] = device["launched"] & is_graph[call]
    return GraphLaunches(int(is_graph.sum()), int((device["is_graph"] & (device["kind"] == KERNEL)).sum()))


def _find_steps(device: Table, compute: int, host: Table, on_gpu: Table, names: list[str]) -> Found:
    """The steps on the compute stream. Kernels, memsets and copies within the device are work of a step; copies from
    and to the host are not."""
    is_result = device["kind"] == D2H
    is_work = (device["stream"] == compute) & ~is_result & (device["kind"] != H2D)
    work = _rows(device, is_work)
    launched = work["launched"]
    # The few whose launch is not recorded take the launch before them.
    seen = np.maximum.accumulate(np.where(launched, np.arange(len(launched)), launched.argmax()))
    launch = work["launch"][seen] if launched.mean() > 0.99 else None
    by_launch = launch is not None and bool(device["launched"][is_result].all())
    annotated = _rows(host, host["kind"] == ANNOTATION)
    return find_steps(
        Work(work["start"], work["end"], work["name"], work["correlation"], launch, work["is_graph"]),
        results=device["launch" if by_launch else "start"][is_result],
        by_launch=by_launch,
        annotations=[one for thread in np.unique(annotated["thread"]) for one in repeated(annotated, names, thread)],
        gpu_annotations=repeated(_rows(on_gpu, on_gpu["stream"] == compute), names),
        names=names,
    )


def _launching_thread(device: Table, compute: int, host: Table) -> int:
    """The thread that launched most of the compute stream's kernel time; where none is known, the one that recorded
    most time of its own."""
    known = device["launched"] & (device["stream"] == compute)
    if known.any():
        return _busiest(device["thread"][known], _kernel_time(device)[known])[0]
    return _busiest(host["thread"], host["end"] - host["start"])[0] if len(host["thread"]) else -1


def _in_order(host: Table) -> Table:
    """The events of a thread that have a length, by start, and the outer before the inner."""
    host = _rows(host, host["end"] > host["start"])
    return _rows(host, np.lexsort([host["name"], host["kind"], -host["end"], host["start"]]))


def _streams(device: Table) -> list[Stream]:
    values, inverse = np.unique(np.column_stack([device["device"], device["stream"]]), axis=0, return_inverse=True)
    inverse, found = inverse.ravel(), []
    for i, (number, stream) in enumerate(values.tolist()):
        starts, ends = union(device["start"][inverse == i], device["end"][inverse == i])
        kinds = device["kind"][inverse == i]
        copies = int(np.isin(kinds, (COPY, H2D, D2H)).sum())
        found.append(Stream(number, stream, 1e-9 * int((ends - starts).sum()), int((kinds == KERNEL).sum()), copies))
    return found


def _by_name(annotations: Table, names: list[str]) -> dict[str, np.ndarray]:
    """Of each name float64 [N, 2], start and end in seconds."""
    order = np.lexsort([annotations[key] for key in ("end", "start", "name")])
    bounds = 1e-9 * np.column_stack([annotations["start"][order], annotations["end"][order]])
    numbers, first = np.unique(annotations["name"][order], return_index=True)
    parts = np.split(bounds, first[1:])
    return {names[number]: part for number, part in zip(numbers.tolist(), parts, strict=False)}


def readable(name: str, kind: int) -> str:
    """The cause that an event of the host stands for: what differs from one occurrence to the next is left out."""
    if kind == RUNTIME:
        return f"{name} (waiting)" if WAITS.search(name) else name
    if kind == ANNOTATION:
        return pattern_of(name)
    if kind == PYTHON:
        name = re.sub(r" at 0x[0-9a-fA-F]+", "", name)
        name = re.sub(r"^(nn\.Module: \w+?)_\d+$", r"\1", name)
        return re.sub(r"^\S*[/\\](?=[^/\\]+\.pyx?\(\d+\): )", "", name)
    return name


def _gaps(steps: np.ndarray, busy: tuple[np.ndarray, np.ndarray], host: Table, names: list[str]) -> Gaps:
    """The gaps between steps and inside them, and what the events of the host (one thread, in order) say of each."""
    starts, ends, name, kind = (host[key] for key in ("start", "end", "name", "kind"))
    between_steps = steps[:-1, 1], steps[1:, 0], np.arange(1, len(steps))
    real = steps[:, 1] > steps[:, 0]
    numbers = np.flatnonzero(real)
    idle = outside(busy[0], busy[1], steps[0, 0], steps[-1, 1])
    inside_starts, inside_ends, which, _ = intersections((steps[real, 0], steps[real, 1]), idle)
    gap_starts = np.r_[between_steps[0], inside_starts]
    gap_ends = np.r_[between_steps[1], inside_ends]
    gap_steps = np.r_[between_steps[2], numbers[which]]
    inside = np.arange(len(gap_starts)) >= len(between_steps[0])
    order = np.lexsort((gap_ends, gap_starts))
    order = order[gap_ends[order] > gap_starts[order]]
    gap_starts, gap_ends, gap_steps, inside = (column[order] for column in (gap_starts, gap_ends, gap_steps, inside))

    # Only what overlaps a gap needs to be looked at one by one.
    seen = covered_before(ends, gap_starts, gap_ends) > covered_before(starts, gap_starts, gap_ends)
    pairs, cause_of = np.unique(name[seen] * 16 + kind[seen].astype(np.int64), return_inverse=True)
    numbered = Names({NOTHING: 0})
    causes = np.array([numbered[readable(names[pair // 16], pair % 16)] for pair in pairs.tolist()], np.int64)
    begins, stops, doing = innermost(starts[seen], ends[seen], causes[cause_of] if len(pairs) else cause_of)
    begins, stops, gap, piece = intersections((gap_starts, gap_ends), (begins, stops))
    cause, ns = doing[piece], stops - begins
    left = (gap_ends - gap_starts).astype(np.int64)
    np.subtract.at(left, gap, ns)
    unrecorded = np.flatnonzero(left)
    gap, cause, ns = np.r_[gap, unrecorded], np.r_[cause, np.zeros_like(unrecorded)], np.r_[ns, left[unrecorded]]
    keys, inverse = np.unique(gap * len(numbered) + cause, return_inverse=True)
    totals = np.zeros(len(keys), np.int64)
    np.add.at(totals, inverse, ns)
    pieces = keys // len(numbered), keys % len(numbered), totals
    return Gaps(gap_starts, gap_ends, gap_steps, inside, list(numbered), pieces)


def busy_in(trace: str | os.PathLike | TraceReport, start_s: float | None = None, end_s: float | None = None) -> float:
    """Kernel busy from `start_s` to `end_s`: the share in which any kernel, copy or memset ran on the device.

    `trace` is a file or a report; the times are the report's, None is its first or last event. TraceError for a file as
    in `read_trace`, ValueError for an empty window."""
    report = trace if isinstance(trace, TraceReport) else read_trace(trace)
    start = 0.0 if start_s is None else start_s
    end = report.window_s if end_s is None else end_s
    if not (math.isfinite(start) and math.isfinite(end) and start < end):
        raise ValueError(f"the window is {start} to {end} s; allowed are finite times with start_s < end_s")
    return _busy_share(report._busy, round(1e9 * start), round(1e9 * end))


def _busy_share(busy: tuple[np.ndarray, np.ndarray], start: int, end: int) -> float:
    before = covered_before(np.array([start, end]), *busy)
    return float(before[1] - before[0]) / max(end - start, 1)


# ---- the command line ---------------------------------------------------------------------------------------------
