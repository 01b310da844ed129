"""Which call of the host launched what on the device, on which threads, and which events cannot be true."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .events import GRAPH_LAUNCH, KERNEL, Columns

S = 10**9  # nanoseconds
FAR = 600 * S  # what is further away from everything else than this is no part of a recording
LATE = 1 * S  # a device ends at most so long after the last that the host recorded, which waits for it at the end


def out_of_place(device: Columns, host: Columns) -> np.ndarray:
    """Which events of the device have times that cannot be true: a start at 0, which is what CUPTI writes where it has
    no time, an end long after the recording, or anything ten minutes away from everything else."""
    starts = np.sort(np.r_[device["start"], host["start"]])
    splits = np.flatnonzero(np.diff(starts) > FAR) + 1
    pieces = np.split(starts, splits)
    most = max(pieces, key=len)
    low, high = int(most[0]), int(most[-1])
    ends = host["end"][(host["start"] >= low) & (host["end"] <= high + FAR)]
    last = max(high, int(ends.max(initial=high))) + LATE if len(ends) else high + FAR
    wrong = (device["start"] < low) | (device["start"] > high) | (device["end"] > last)
    others = starts[starts > 0]
    if len(others) and others[0] > LATE:
        wrong |= device["start"] == 0
    return wrong


def link(device: Columns, runtime: Columns, names: list[str], graphs: Sequence[int] | None = None) -> None:
    """Find the call that launched each device event, by correlation id, and put into the column `graph` which graph
    brought it, where the caller knows (`graphs`: as for `read_trace`).

    It adds columns to `device`: `launched` (whether the call is known), `launch`, `returned` and `thread` (when the
    call began and ended, and where; they mean nothing where it is not known), and `is_graph` (a graph launch brought
    it; where the call is not known, several kernels of one id can only have come from a graph)."""
    ids, count = device["correlation"], len(runtime["correlation"])
    order = np.lexsort([runtime[key] for key in ("thread", "name", "start", "correlation")])
    at = np.minimum(np.searchsorted(runtime["correlation"][order], ids), max(count - 1, 0))
    call = order[at] if count else at
    device["launched"] = (ids > 0) & (runtime["correlation"][call] == ids) if count else np.zeros(len(ids), bool)
    for column, key in (("launch", "start"), ("returned", "end"), ("thread", "thread")):
        device[column] = runtime[key][call] if count else np.zeros(len(ids), np.int64)
    is_kernel = device["kind"] == KERNEL
    _, inverse = np.unique(ids, return_inverse=True)
    kernels = np.bincount(inverse, is_kernel)[inverse]
    device["is_graph"] = ~device["launched"] & (kernels > 1) & (ids > 0)
    if count:
        by_graph = np.array([bool(GRAPH_LAUNCH.search(name)) for name in names], bool)[runtime["name"]]
        device["is_graph"] |= device["launched"] & by_graph[call]
        if graphs is not None:
            _number_graphs(device, runtime, by_graph, graphs)


def _number_graphs(device: Columns, runtime: Columns, by_graph: np.ndarray, graphs: Sequence[int]) -> None:
    """The column `graph` from the number of each graph launch, in order. by_graph: which calls of `runtime` are such.
    Nothing is done where there are more or fewer numbers than launches."""
    calls = np.flatnonzero(by_graph)
    if len(calls) != len(graphs) or not len(calls):
        return
    calls = calls[np.argsort(runtime["start"][calls], kind="stable")]
    ids, first = np.unique(runtime["correlation"][calls], return_index=True)
    at = np.minimum(np.searchsorted(ids, device["correlation"]), len(ids) - 1)
    known = device["is_graph"] & (ids[at] == device["correlation"])
    device["graph"] = np.where(known, np.asarray(graphs, np.int64)[first[at]], device["graph"])


def launching_threads(device: Columns, compute: int, host: Columns) -> list[int]:
    """The threads that launched work on the device: first the one that launched most of the kernel time on the compute
    stream, then the others by all that they launched. Where no launch is known, the thread that recorded most time."""
    known = device["launched"]
    time = np.where(device["kind"] == KERNEL, device["end"] - device["start"], 0)
    on_compute = known & (device["stream"] == compute)
    if not on_compute.any():
        return [busiest(host["thread"], host["end"] - host["start"])[0]] if len(host["thread"]) else []
    main = busiest(device["thread"][on_compute], time[on_compute])[0]
    threads, inverse = np.unique(device["thread"][known], return_inverse=True)
    totals = np.bincount(inverse, time[known])
    return [main, *(int(threads[at]) for at in np.argsort(-totals, kind="stable") if threads[at] != main)]


def busiest(groups: np.ndarray, time: np.ndarray) -> tuple[int, int]:
    """The group with most `time` (the smaller number, where two have the same), and how many groups have any."""
    values, inverse = np.unique(groups, return_inverse=True)
    totals = np.zeros(len(values), np.int64)
    np.add.at(totals, inverse, time)
    return int(values[totals.argmax()]), int((totals > 0).sum())
