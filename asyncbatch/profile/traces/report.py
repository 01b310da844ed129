"""The report on a trace: its numbers, the same as plain values for JSON, and its timeline to plot (`text.py` has its
text)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from ...measure.percentile import p99
from ...timeline import Timeline, busy_curve, union
from .coverage import Coverage
from .gaps import TraceGap, TraceGaps
from .intervals import Stretches, close_pauses, intersections, outside
from .overlap import Overlap
from .text import lines

SCHEMA = 2
MOST_HOST_PIECES = 100_000  # of the host lane of `timeline`


class StreamUse(NamedTuple):
    """What one stream of a device was used for: seconds in which anything ran on it, how many kernels, how many
    copies."""

    device: int
    stream: int
    busy_s: float
    kernels: int
    copies: int


class GraphLaunches(NamedTuple):
    """How many graphs the host launched, and how many of the device's kernels came from them, by correlation id."""

    calls: int
    kernels: int


@dataclass(eq=False, repr=False)
class TraceReport:
    """How idle the GPU of a trace was. Times are seconds from the first kernel or copy of `device`, but nanoseconds in
    the fields with `_ns`.

    `streams`: the use of each stream of each device in the file. `compute_stream`: the stream of `device` with most
    kernel time. `steps`: float64 [N, 2], start and end of each step on it; `how_steps` says how they were found.
    `step_active`: the share of the time from the end of the first step to the end of the last in which a step ran; None
    with fewer than two steps, and where events of the device are missing. `kernel_busy`: the share of `window_s`, from
    the first to the last event of the device, in which any kernel, copy or memset ran on it. `kernel_busy_in_steps`:
    the same share over the time of `step_active`. `graph_launches`: None where the trace has no runtime events.
    `coverage`: whether anything is missing; if it is not complete, no idle figure is given: shares are None, and there
    are no gaps. `overlap`: how host and device take turns; None where that is not known. `gaps`: the idle time
    (`gaps.py` says what a gap is); the gaps between steps add up to the idle time behind `step_active`. `rank`: of a
    process among several, as the trace says. `notes`: what else a reader must know.

    `busy_ns`: the stretches in which anything ran on the device. `collectives_ns`: those in which a kernel of a
    collective (NCCL and the like) ran. `copies_ns`: (starts, ends) of the copies on the lanes "H2D" and "D2H".
    `host_ns`: (starts, ends, whether it waits for the device) of the events of the launching thread."""

    label: str
    rank: int | None
    device: int
    gpu: str | None
    streams: list[StreamUse]
    compute_stream: int
    steps: np.ndarray
    how_steps: str
    kernel_busy: float | None
    kernel_busy_in_steps: float | None
    step_active: float | None
    window_s: float
    num_events: int
    num_kernels: int
    num_copies: int
    graph_launches: GraphLaunches | None
    coverage: Coverage
    overlap: Overlap | None
    gaps: TraceGaps
    notes: list[str]
    busy_ns: Stretches
    copies_ns: dict[str, tuple[np.ndarray, np.ndarray]]
    host_ns: tuple[np.ndarray, np.ndarray, np.ndarray]
    collectives_ns: Stretches

    def __repr__(self) -> str:
        return f"<TraceReport: {self.label}, {len(self.steps)} steps, {self.num_kernels} kernels>"

    @property
    def collectives_s(self) -> float:
        """Seconds in which a kernel of a collective ran."""
        starts, ends = self.collectives_ns
        return 1e-9 * int((ends - starts).sum())

    @property
    def collectives_in_steps_s(self) -> list[float]:
        """For each step the seconds in which a kernel of a collective ran."""
        times, busy = busy_curve(*self.collectives_ns)
        before = np.interp(1e9 * self.steps, times, busy)
        return (1e-9 * (before[:, 1] - before[:, 0])).tolist()

    @cached_property
    def idle_s(self) -> dict[str, float]:
        """Seconds of all gaps "between steps", and of all gaps "inside steps"."""
        inside = int(self.gaps.ns[self.gaps.inside].sum())
        return {"between steps": 1e-9 * (int(self.gaps.ns.sum()) - inside), "inside steps": 1e-9 * inside}

    def idle_by_cause(self, inside: bool | None = None) -> dict[str, float]:
        """Seconds of the gaps by what the host was doing, the largest first. `inside`: True counts only the gaps inside
        steps, False only those between steps."""
        return {cause: 1e-9 * ns for cause, ns in self.gaps.ns_by_cause(inside).items()}

    def longest(self, count: int = 10) -> list[TraceGap]:
        """The `count` longest gaps, the longest first."""
        return self.gaps.longest(count)

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values for JSON. `schema` is a number. Keys with `_s` are seconds, keys with `ms` are
        milliseconds, shares are from 0 to 1; null means that the trace does not say.

        `steps`: count, how, and the median and 99th percentile of their length and of the period from end to end.
        `coverage` and `overlap`: see these classes; where coverage is not complete, `step_active`, both `kernel_busy`
        and `idle` are null. `idle`: for "between_steps" and "inside_steps" the seconds `s` and `by_cause`.
        `longest_gaps`: at most twenty."""
        lengths, periods = 1e3 * (self.steps[:, 1] - self.steps[:, 0]), 1e3 * np.diff(self.steps[:, 1])
        steps = {"count": len(self.steps), "how": self.how_steps}
        for key, values in (("ms", lengths), ("period_ms", periods)):
            steps[f"{key}_median"] = float(np.median(values)) if len(values) else None
            steps[f"{key}_p99"] = p99(values.tolist()) if len(values) else None
        idle = {
            key.replace(" ", "_"): {"s": seconds, "by_cause": self.idle_by_cause(key == "inside steps")}
            for key, seconds in self.idle_s.items()
        }
        return {
            "schema": SCHEMA,
            "trace": self.label,
            "rank": self.rank,
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
            "collectives_s": self.collectives_s,
            "graph_launches": self.graph_launches and self.graph_launches._asdict(),
            "coverage": self.coverage.as_dict(),
            "steps": steps,
            "overlap": self.overlap and self.overlap.as_dict(),
            "idle": idle if self.coverage.complete else None,
            "longest_gaps": [
                {"step": gap.step, "inside": gap.inside, "start_s": gap.start, "ms": gap.ms, "cause": gap.cause}
                for gap in self.longest(20)
            ],
            "notes": self.notes,
        }

    def __str__(self) -> str:
        return "\n".join(lines(self))

    def timeline(self) -> Timeline:
        """The steps, copies and host work as a `Timeline` to plot, with the lanes host, H2D, compute and D2H.

        Every step counts as "decode", so that its summary has the `step_active` of this report. The host lane is the
        launching thread: "wait" is a call that synchronizes, "work" is anything else that was recorded. If that gives
        more than MOST_HOST_PIECES, the shortest pauses between them are closed."""
        timeline = Timeline(self.label, "cuda")
        starts, ends = self.steps[:, 0], self.steps[:, 1]
        for number, (start, end) in enumerate(self.steps.tolist()):
            timeline.add("compute", "step", number, start, end)
            timeline.add_step(number, "decode", 0, 0)
        last = len(self.steps) - 1
        for lane, name, side in (("H2D", "copy_in", "left"), ("D2H", "copy_out", "right")):
            begins, stops = (1e-9 * column for column in self.copies_ns[lane])
            # A copy in is for the next step to begin, a copy out comes from the last step that began before it.
            near = np.searchsorted(starts, begins, side) - (lane == "D2H")
            for number, start, end in zip(np.clip(near, 0, last), begins, stops, strict=True):
                timeline.add(lane, name, int(number), float(start), float(end))
        begins, stops, waits = self.host_ns
        pieces = {"wait": union(begins[waits], stops[waits])}
        work = union(begins[~waits], stops[~waits])
        if len(work[0]):
            work = intersections(work, outside(*pieces["wait"], work[0][0], work[1][-1]))[:2]
        pieces["work"] = close_pauses(MOST_HOST_PIECES, *work)
        for name, (begins, stops) in pieces.items():
            near = np.clip(np.searchsorted(ends, 1e-9 * begins, "right"), 0, last)
            for number, start, end in zip(near.tolist(), begins.tolist(), stops.tolist(), strict=True):
                timeline.add("host", name, number, 1e-9 * start, 1e-9 * end)
        return timeline
