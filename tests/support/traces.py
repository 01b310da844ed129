"""A made-up trace as a report, and times of both in whole nanoseconds."""

from __future__ import annotations

from pathlib import Path

from asyncbatch.profile.traces.read import read_trace
from asyncbatch.profile.traces.report import TraceReport

from .make_trace import Trace


def read(trace: Trace | str, folder: Path, name: str = "trace.json", **options) -> TraceReport:
    """The report on a trace, or on the text of a file; `options` are those of `Trace.save`."""
    path = folder / name
    if isinstance(trace, str):
        path.write_text(trace)
    else:
        trace.save(path, **options)
    return read_trace(path)


def ns(seconds: float) -> int:
    return round(1e9 * float(seconds))


def steps_ns(report: TraceReport) -> list[tuple[int, int]]:
    """Start and end of each step of the report."""
    return [(ns(start), ns(end)) for start, end in report.steps]


def from_zero(trace: Trace, intervals: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The intervals of a trace as a report counts them, from its first kernel."""
    first = min(start for start, _ in trace.kernels)
    return [(start - first, end - first) for start, end in intervals]


def union_ns(intervals: list[tuple[int, int]]) -> int:
    """How much the intervals cover together."""
    total, reach = 0, min((start for start, _ in intervals), default=0)
    for start, end in sorted(intervals):
        total += max(0, end - max(start, reach))
        reach = max(reach, end)
    return total
