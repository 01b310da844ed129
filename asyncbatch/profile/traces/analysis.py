"""From the events of a trace to the report on it: the device, its compute stream, the launches, the steps, the gaps.

`report_on` goes through these one after the other; each has a function below. Times are whole nanoseconds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...timeline import device_activity, union
from .annotations import groups_of
from .coverage import check
from .events import ANNOTATION, COPY, D2H, GRAPH_LAUNCH, H2D, KERNEL, RUNTIME, Columns, Events, TraceError
from .gaps import WAITS, TraceGaps, find_gaps, host_pieces, no_gaps
from .intervals import Stretches, covered_share
from .launches import busiest, launching_threads, link, out_of_place
from .overlap import PARTS, Overlap, judge, split_gaps
from .report import GraphLaunches, StreamUse, TraceReport
from .steps import UNKNOWN, TraceSteps, Work, find_steps

COLLECTIVE = re.compile(r"nccl|rccl|all_?(reduce|gather)|reduce_?scatter|cross_device_reduce", re.IGNORECASE)
COPIES = (COPY, H2D, D2H)


def report_on(label: str, events: Events, graphs: Sequence[int] | None = None) -> TraceReport:
    """The report on events that hold at least one kernel. `graphs`: as for `read_trace`. TraceError if no kernel has a
    time that can be true."""
    device, host, runtime, on_gpu, names = events.columns()
    notes = [f"{events.unusable} events without a usable time were left out."] if events.unusable else []
    device = _plausible(device, host, notes)
    streams = _stream_uses(device)
    number, several = busiest(device["device"], _kernel_time(device))
    if several > 1:
        notes.append(f"{several} devices are in the trace: {number} is reported, the one with most kernel time.")
    everywhere, device = device["correlation"], _one_device(device, number)
    _from_zero(device, host, runtime, on_gpu)
    compute, _ = busiest(device["stream"], _kernel_time(device))
    link(device, runtime, names, graphs)
    steps = _find_steps(device, compute, host, _rows(on_gpu, on_gpu["device"] == number), names)
    notes += [steps.note] if steps.note else []
    waits = _in_order(_rows(host, (host["kind"] == RUNTIME) & _matching(WAITS, names)[host["name"]]))
    coverage = check(
        device, everywhere, runtime, (waits["start"], waits["end"]), names, one_step=len(steps.extents) < 2
    )
    threads = [_in_order(_rows(host, host["thread"] == one)) for one in launching_threads(device, compute, host)]
    kinds, busy, window = device["kind"], union(device["start"], device["end"]), int(device["end"].max())
    collectives = union(*_times(device, (kinds == KERNEL) & _matching(COLLECTIVE, names)[device["name"]]))
    gaps = find_gaps(steps.extents, busy, threads, names) if coverage.complete else no_gaps()
    own = threads[0] if threads else _rows(host, np.zeros(0, np.int64))
    main = int(own["thread"][0]) if len(own["thread"]) else -1
    step_active = busy_in_steps = overlap = None
    begin, end = int(steps.extents[0, 1]), int(steps.extents[-1, 1])  # the first step's period is not known
    if end > begin and coverage.complete:
        step_active = device_activity(steps.extents[:, 0], steps.extents[:, 1])[0] / (end - begin)
        busy_in_steps = covered_share(busy, begin, end)
        notes += _difference(step_active, busy_in_steps, gaps, end - begin)
        if not coverage.early:
            overlap = _overlap(device, steps, threads, _times(waits, waits["thread"] == main), names)
    return TraceReport(
        label=label,
        rank=_rank(events.about),
        device=number,
        gpu=_gpu_name(events.about, number),
        streams=streams,
        compute_stream=compute,
        steps=1e-9 * steps.extents,
        how_steps=steps.how,
        kernel_busy=covered_share(busy, 0, window) if coverage.complete else None,
        kernel_busy_in_steps=busy_in_steps,
        step_active=step_active,
        window_s=1e-9 * window,
        num_events=events.count,
        num_kernels=int((kinds == KERNEL).sum()),
        num_copies=int(np.isin(kinds, COPIES).sum()),
        graph_launches=_graph_launches(device, runtime, names),
        coverage=coverage,
        overlap=overlap,
        gaps=gaps,
        notes=notes,
        busy_ns=busy,
        copies_ns={lane: _times(device, kinds == kind) for lane, kind in (("H2D", H2D), ("D2H", D2H))},
        host_ns=(own["start"], own["end"], (own["kind"] == RUNTIME) & _matching(WAITS, names)[own["name"]]),
        collectives_ns=collectives,
    )


def _from_zero(device: Columns, *others: Columns) -> None:
    """Count all times from the device's first one."""
    origin = int(device["start"][0])
    for columns in (device, *others):
        for key in columns.keys() & {"start", "end"}:
            columns[key] = columns[key] - origin


def _plausible(device: Columns, host: Columns, notes: list[str]) -> Columns:
    """The events of all devices without those whose times cannot be true, of which it makes a note. TraceError if no
    kernel is left."""
    wrong = out_of_place(device, host)
    if wrong.any():
        notes.append(
            f"{int(wrong.sum())} events of the device were left out: by their times they are no part of this recording "
            "(CUPTI writes a start of 0 where it has none)."
        )
    left = _rows(device, ~wrong)
    if not (left["kind"] == KERNEL).any():
        raise TraceError(f"holds no kernel with a time within its recording: {notes[-1]}")
    return left


def _overlap(device: Columns, steps: TraceSteps, threads: list[Columns], waits: Stretches, names) -> Overlap | None:
    """How the host and the device take turns."""
    results = _rows(device, device["kind"] == D2H)  # in order of start
    _, parts = split_gaps(steps.extents, steps.launch, (results["start"], results["end"]))
    late = parts[PARTS[1]]
    causes, (_, cause, ns) = host_pieces(*late, threads, names)
    totals = np.bincount(cause, ns, len(causes)).astype(np.int64)
    by_cause = {causes[at]: int(totals[at]) for at in np.argsort(-totals, kind="stable") if totals[at]}
    # A call that copies to the host and comes back after the copy has waited for it.
    waited = results["launched"] & (results["returned"] >= results["end"])
    starts = np.r_[waits[0], results["launch"][waited]]
    ends = np.r_[waits[1], results["returned"][waited]]
    return judge(steps.extents, steps.launch, parts, by_cause, (starts, ends), bool(len(starts)))


def _difference(step_active: float, busy_in_steps: float, gaps: TraceGaps, period: int) -> list[str]:
    """A note where the two methods differ by more than two points, with what makes the difference. `period`: from the
    end of the first step to the end of the last."""
    points = 100 * (step_active - busy_in_steps)
    if abs(points) <= 2:
        return []
    inside = gaps.inside & (gaps.steps > 0)
    empty = 100 * int(gaps.ns[inside].sum()) / period
    parts = (empty, "nothing runs inside a step"), (empty - points, "a copy or another stream runs between steps")
    reasons = " and ".join(f"in {share:.1f} % of the time {what}" for share, what in parts if share >= 0.05)
    return [f"Step active and kernel busy differ by {abs(points):.1f} points: {reasons}."]


# ---- columns of events ----------------------------------------------------------------------------------------------


def _rows(columns: Columns, rows: np.ndarray) -> Columns:
    return {key: column[rows] for key, column in columns.items()}


def _kernel_time(device: Columns) -> np.ndarray:
    """The length of each kernel; 0 for any other event."""
    return np.where(device["kind"] == KERNEL, device["end"] - device["start"], 0)


def _times(columns: Columns, rows: np.ndarray) -> Stretches:
    return columns["start"][rows], columns["end"][rows]


def _matching(pattern: re.Pattern, names: list[str]) -> np.ndarray:
    return np.array([bool(pattern.search(name)) for name in names], bool)


def _in_order(host: Columns) -> Columns:
    """The events of a thread that have a length, in order of start, outer events before inner ones."""
    host = _rows(host, host["end"] > host["start"])
    return _rows(host, np.lexsort([host["name"], host["kind"], -host["end"], host["start"]]))


# ---- devices, streams, launches, steps ------------------------------------------------------------------------------


def _one_device(device: Columns, number: int) -> Columns:
    """The events of one device, in an order that does not depend on the file."""
    own = _rows(device, device["device"] == number)
    return _rows(own, np.lexsort([own[key] for key in ("stream", "kind", "name", "correlation", "end", "start")]))


def _stream_uses(device: Columns) -> list[StreamUse]:
    """One for each stream of each device, by their numbers."""
    values, inverse = np.unique(np.column_stack([device["device"], device["stream"]]), axis=0, return_inverse=True)
    inverse, uses = inverse.ravel(), []
    for i, (number, stream) in enumerate(values.tolist()):
        starts, ends = union(device["start"][inverse == i], device["end"][inverse == i])
        kinds = device["kind"][inverse == i]
        copies = int(np.isin(kinds, COPIES).sum())
        uses.append(StreamUse(number, stream, 1e-9 * int((ends - starts).sum()), int((kinds == KERNEL).sum()), copies))
    return uses


def _graph_launches(device: Columns, runtime: Columns, names: list[str]) -> GraphLaunches | None:
    """None where the trace has no runtime events."""
    if not len(runtime["name"]):
        return None
    calls = int(_matching(GRAPH_LAUNCH, names)[runtime["name"]].sum())
    return GraphLaunches(calls, int((device["is_graph"] & (device["kind"] == KERNEL)).sum()))


def _find_steps(device: Columns, compute: int, host: Columns, on_gpu: Columns, names: list[str]) -> TraceSteps:
    """The steps on the compute stream. Kernels, memsets and copies within the device are work of a step; copies from
    and to the host are not."""
    is_result = device["kind"] == D2H
    own = _rows(device, (device["stream"] == compute) & ~is_result & (device["kind"] != H2D))
    launch = np.where(own["launched"], own["launch"], UNKNOWN)
    work = Work(own["start"], own["end"], own["name"], own["correlation"], launch, own["is_graph"])
    by_launch = work.launch_order is not None and bool(device["launched"][is_result].all())
    annotations = _rows(host, host["kind"] == ANNOTATION)
    threads = np.unique(annotations["thread"])
    return find_steps(
        work,
        results=device["launch" if by_launch else "start"][is_result],
        by_launch=by_launch,
        annotations=[group for thread in threads for group in groups_of(annotations, names, thread)],
        gpu_annotations=groups_of(_rows(on_gpu, on_gpu["stream"] == compute), names),
        names=names,
    )


# ---- what the file says beside its events ---------------------------------------------------------------------------


def _gpu_name(about: dict[str, Any], device: int) -> str | None:
    for key in ("deviceProperties", "computeProperties"):
        listed = about.get(key)
        for properties in listed if isinstance(listed, list) else ():
            if isinstance(properties, dict) and properties.get("id") == device and properties.get("name"):
                return str(properties["name"])
    return None


def _rank(about: dict[str, Any]) -> int | None:
    """The rank that wrote the trace; None where there was one process only, or the trace does not say."""
    job = about.get("distributedInfo")
    if not isinstance(job, dict) or not isinstance(job.get("rank"), int) or job.get("world_size") == 1:
        return None
    return job["rank"]
