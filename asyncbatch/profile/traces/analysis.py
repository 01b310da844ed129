"""From the events of a trace to the report on it: the device, its compute stream, the launches, the steps, the gaps.

`report_on` goes through these one after the other; each has a function below. Times are whole nanoseconds.
"""

from __future__ import annotations

import re

import numpy as np

from ...timeline import device_activity, union
from .events import ANNOTATION, COPY, D2H, H2D, KERNEL, RUNTIME, Columns, Events
from .gaps import WAITS, TraceGaps, find_gaps
from .intervals import covered_share
from .report import GraphLaunches, StreamUse, TraceReport
from .steps import TraceSteps, Work, find_steps, repeated

GRAPH_LAUNCH = re.compile(r"(cuda|cu|hip)GraphLaunch")


def report_on(label: str, events: Events) -> TraceReport:
    """The report on events that hold at least one kernel."""
    device, host, runtime, on_gpu, names = events.columns()
    notes = [f"{events.unusable} events without a usable time were left out."] if events.unusable else []
    streams = _stream_uses(device)
    number, several = _busiest(device["device"], _kernel_time(device))
    if several > 1:
        notes.append(f"{several} devices are in the trace: {number} is reported, the one with most kernel time.")
    device = _one_device(device, number)
    origin = int(device["start"][0])
    for columns in (device, host, runtime, on_gpu):
        for key in columns.keys() & {"start", "end"}:
            columns[key] = columns[key] - origin
    kinds, busy, window = device["kind"], union(device["start"], device["end"]), int(device["end"].max())
    compute, _ = _busiest(device["stream"], _kernel_time(device))
    launches = _find_launches(device, runtime, names)
    if launches is not None and launches.calls and not launches.kernels:
        notes.append("Graphs were launched, and none of their kernels is in the trace: kernel busy is too low.")
    steps = _find_steps(device, compute, host, _rows(on_gpu, on_gpu["device"] == number), names)
    notes += [steps.note] if steps.note else []
    own = _in_order(_rows(host, host["thread"] == _launching_thread(device, compute, host)))
    gaps = find_gaps(steps.extents, busy, own, names)
    step_active = busy_in_steps = None
    begin, end = int(steps.extents[0, 1]), int(steps.extents[-1, 1])  # the first step's period is not known
    if end > begin:
        step_active = device_activity(steps.extents[:, 0], steps.extents[:, 1])[0] / (end - begin)
        busy_in_steps = covered_share(busy, begin, end)
        notes += _difference(step_active, busy_in_steps, gaps, end - begin)
    is_copy = {"H2D": kinds == H2D, "D2H": kinds == D2H}
    return TraceReport(
        label=label,
        device=number,
        gpu=None,
        streams=streams,
        compute_stream=compute,
        steps=1e-9 * steps.extents,
        how_steps=steps.how,
        kernel_busy=covered_share(busy, 0, window),
        kernel_busy_in_steps=busy_in_steps,
        step_active=step_active,
        window_s=1e-9 * window,
        num_events=events.count,
        num_kernels=int((kinds == KERNEL).sum()),
        num_copies=int(np.isin(kinds, (COPY, H2D, D2H)).sum()),
        graph_launches=launches,
        gaps=gaps,
        notes=notes,
        busy_ns=busy,
        copies_ns={lane: (device["start"][mask], device["end"][mask]) for lane, mask in is_copy.items()},
        host_ns=(own["start"], own["end"], (own["kind"] == RUNTIME) & _matching(WAITS, names)[own["name"]]),
    )


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


def _busiest(groups: np.ndarray, time: np.ndarray) -> tuple[int, int]:
    """The group with most `time` (the smaller number, where two have the same), and how many groups have any."""
    values, inverse = np.unique(groups, return_inverse=True)
    totals = np.zeros(len(values), np.int64)
    np.add.at(totals, inverse, time)
    return int(values[totals.argmax()]), int((totals > 0).sum())


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
        copies = int(np.isin(kinds, (COPY, H2D, D2H)).sum())
        uses.append(StreamUse(number, stream, 1e-9 * int((ends - starts).sum()), int((kinds == KERNEL).sum()), copies))
    return uses


def _find_launches(device: Columns, runtime: Columns, names: list[str]) -> GraphLaunches | None:
    """Find the call that launched each device event, by correlation id. None where the trace has no runtime events.

    It adds columns to `device`: `launched` (whether the call is known), `launch` and `thread` (when and where it was
    made; they mean nothing where it is not known), and `is_graph`."""
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


def _launching_thread(device: Columns, compute: int, host: Columns) -> int:
    """The thread that launched most of the kernel time on the compute stream. Where no launch is known, it is the
    thread that recorded most time."""
    known = device["launched"] & (device["stream"] == compute)
    if known.any():
        return _busiest(device["thread"][known], _kernel_time(device)[known])[0]
    return _busiest(host["thread"], host["end"] - host["start"])[0] if len(host["thread"]) else -1


def _find_steps(device: Columns, compute: int, host: Columns, on_gpu: Columns, names: list[str]) -> TraceSteps:
    """The steps on the compute stream. Kernels, memsets and copies within the device are work of a step; copies from
    and to the host are not."""
    is_result = device["kind"] == D2H
    is_work = (device["stream"] == compute) & ~is_result & (device["kind"] != H2D)
    work = _rows(device, is_work)
    launched = work["launched"]
    # The few whose launch was not recorded take the launch before them.
    last_known = np.maximum.accumulate(np.where(launched, np.arange(len(launched)), launched.argmax()))
    launch = work["launch"][last_known] if launched.mean() > 0.99 else None
    by_launch = launch is not None and bool(device["launched"][is_result].all())
    annotations = _rows(host, host["kind"] == ANNOTATION)
    threads = np.unique(annotations["thread"])
    return find_steps(
        Work(work["start"], work["end"], work["name"], work["correlation"], launch, work["is_graph"]),
        results=device["launch" if by_launch else "start"][is_result],
        by_launch=by_launch,
        annotations=[group for thread in threads for group in repeated(annotations, names, thread)],
        gpu_annotations=repeated(_rows(on_gpu, on_gpu["stream"] == compute), names),
        names=names,
    )
