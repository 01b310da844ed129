"""Is everything in a trace that ran on the device? A profiler can lose events, above all those of replayed graphs, and
then the device seems to be idle where it was not.

Each launch of a kernel or a graph, and each copy, has the correlation id of what it started on the device. In 47 public
traces of CUDA and ROCm, whose calls are some 100,000, not one such call was without its event, except where a graph was
being captured: nothing runs then.

A graph launch brings many kernels under one id, and some of them may be lost. Launches of one graph bring the same
kernels. Where the trace does not say which graph it was (torch 2.11 does not), a launch that brings a part of what
another one brings, and that no other launch is like, has lost the rest; and if most of the graphs' time is in launches
that are like no other, nobody can say. What a single launch of its own kind has lost shows at its edges only: the
device stands still with work that it was given, or the host waits for it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .events import COPY_CALL, GRAPH_LAUNCH, KERNEL_LAUNCH, Columns
from .intervals import Stretches

CAPTURE = re.compile(r"StreamBeginCapture|StreamEndCapture")
STILL_NS = 100_000  # a device with work takes less to begin it: 1 to 20 us in the traces under tests/
MOST_COMPARED = 500  # graph launches that a single one is compared with
KINDS = {"graph launches": GRAPH_LAUNCH, "kernel launches": KERNEL_LAUNCH, "copies": COPY_CALL}


@dataclass(frozen=True)
class Coverage:
    """How far the events of the device can be trusted.

    `calls`, `missing`: how many graph launches, kernel launches and copies the host made, and of how many nothing is on
    the device; both empty where the trace has no calls of the runtime, and then `known` is False. `partial`: graph
    launches of which a part is missing. `alike`: None, or (graph launches that are like another one, all of them),
    where too few are to tell whether anything is missing. `still_ms`: the longest time that the device stood still with
    work beside a graph launch that nothing can be compared with; 0 below STILL_NS. `early`, `early_ms`: how many events
    begin on the device before the host launched them, and by how much at most: its clock and the host's disagree."""

    known: bool = False
    calls: dict[str, int] = field(default_factory=dict)
    missing: dict[str, int] = field(default_factory=dict)
    partial: int = 0
    alike: tuple[int, int] | None = None
    still_ms: float = 0.0
    early: int = 0
    early_ms: float = 0.0

    @property
    def complete(self) -> bool:
        """Whether nothing is known to be missing."""
        return not (self.missing or self.partial or self.alike or self.still_ms)

    def problems(self) -> list[str]:
        """What is missing, in words: a part of a sentence each."""
        found = [
            f"{count} of {self.calls[kind]} {kind} have no event of the device" for kind, count in self.missing.items()
        ]
        if self.partial:
            found.append(
                f"{self.partial} of {self.calls.get('graph launches', self.partial)} graph launches lack a part"
            )
        if self.alike:
            found.append(
                f"only {self.alike[0]} of {self.alike[1]} graph launches brought the same kernels as another one, so "
                "that missing ones would not be seen"
            )
        if self.still_ms:
            found.append(
                f"for {self.still_ms:.3f} ms nothing ran beside a graph launch, though work was launched or waited for"
            )
        return found

    def as_dict(self) -> dict[str, Any]:
        return {
            "known": self.known,
            "complete": self.complete,
            "calls": self.calls,
            "without_device_events": self.missing,
            "partial_graph_launches": self.partial,
            "problems": self.problems(),
            "events_before_their_launch": self.early,
            "before_their_launch_ms": self.early_ms,
        }


def check(
    device: Columns,
    everywhere: np.ndarray,
    runtime: Columns,
    waits: Stretches,
    names: list[str],
    one_step: bool = False,
) -> Coverage:
    """What is missing of the events of one device.

    device: its events, with the columns that `launches.link` adds. everywhere: the correlation ids of all devices.
    runtime: the calls of the host. waits: starts and ends of those that wait for the device, in order. names: what the
    columns `name` count in. one_step: the trace is of one step, whose graphs (of a layer each, perhaps) have nothing to
    be compared with."""
    calls, missing = _missing(everywhere, runtime, names)
    partial, alike, lonely = _parts(device)
    if one_step:
        partial, alike = 0, None
    early = np.where(device["launched"], device["launch"] - device["start"], 0)
    return Coverage(
        known=bool(calls),
        calls=calls,
        missing=missing,
        partial=partial,
        alike=alike,
        still_ms=1e-6 * _still(device, waits, lonely),
        early=int((early > 0).sum()),
        early_ms=1e-6 * max(int(early.max()), 0),
    )


def _missing(everywhere: np.ndarray, runtime: Columns, names: list[str]) -> tuple[dict[str, int], dict[str, int]]:
    """(calls, missing) by kind, as in `Coverage`."""
    has_event = np.isin(runtime["correlation"], everywhere) & (runtime["correlation"] > 0)
    counts = ~_in_capture(runtime, names) & (runtime["correlation"] > 0)
    calls, missing = {}, {}
    for kind, pattern in KINDS.items():
        numbers = [at for at, name in enumerate(names) if pattern.search(name)]
        of_kind = np.isin(runtime["name"], numbers) & counts
        if of_kind.any():
            calls[kind] = int(of_kind.sum())
            if lost := int((of_kind & ~has_event).sum()):
                missing[kind] = lost
    return calls, missing


def _in_capture(runtime: Columns, names: list[str]) -> np.ndarray:
    """Which calls were made while their thread captured a graph: they are recorded, and start nothing."""
    marks = [at for at, name in enumerate(names) if CAPTURE.search(name)]
    begins = [at for at in marks if "Begin" in names[at]]
    order = np.lexsort([runtime["start"], runtime["thread"]])
    name = runtime["name"][order]
    step = np.where(np.isin(name, begins), 1, np.where(np.isin(name, marks), -1, 0))
    thread, depth = runtime["thread"][order], np.cumsum(step)
    first = np.r_[True, thread[1:] != thread[:-1]] if len(thread) else np.zeros(0, bool)
    before = np.where(first, depth - step, 0)  # what other threads left open
    depth = depth - before[np.maximum.accumulate(np.where(first, np.arange(len(first)), 0))] if len(thread) else depth
    inside = np.zeros(len(name), bool)
    inside[order] = depth > 0
    return inside


def _parts(device: Columns) -> tuple[int, tuple[int, int] | None, np.ndarray]:
    """(partial, alike) as in `Coverage`, and the correlation ids of graph launches that are like no other."""
    rows = np.flatnonzero(device["is_graph"])
    ids, launch = np.unique(device["correlation"][rows], return_inverse=True)
    if not len(ids):
        return 0, None, ids
    # A launch is the bag of its kernels: how often each name occurs.
    what, name = np.unique(device["name"][rows] * 8 + device["kind"][rows], return_inverse=True)
    pairs, counts = np.unique(launch * len(what) + name, return_counts=True)
    bags = [
        tuple(zip((pairs[part] % len(what)).tolist(), counts[part].tolist(), strict=True))
        for part in np.split(np.arange(len(pairs)), np.searchsorted(pairs // len(what), np.arange(1, len(ids))))
    ]
    graph = np.zeros(len(ids), np.int64)
    np.maximum.at(graph, launch, device["graph"][rows])
    keys: dict[tuple, list[int]] = {}
    for at, bag in enumerate(bags):
        keys.setdefault((int(graph[at]), bag), []).append(at)
    partial = _partial(keys)
    repeated = np.zeros(len(ids), bool)
    for places in keys.values():
        repeated[places] = len(places) > 1
    time = np.zeros(len(ids), np.int64)
    np.add.at(time, launch, device["end"][rows] - device["start"][rows])
    unsure = len(ids) > 1 and time[repeated].sum() < 0.5 * time.sum()
    return partial, (int(repeated.sum()), len(ids)) if unsure and not partial else None, ids[~repeated]


def _partial(keys: dict[tuple, list[int]]) -> int:
    """How many launches lack a part. keys: the launches of each (number of the graph, bag of kernels)."""
    most: dict[int, int] = {}  # by graph whose number is known
    for number, bag in keys:
        most[number] = max(most.get(number, 0), sum(count for _, count in bag))
    whole = [dict(bag) for (number, bag), places in keys.items() if not number and len(places) > 1]
    single = [dict(bag) for (number, bag), places in keys.items() if not number and len(places) == 1]
    lacking, others = 0, [*whole, *single][:MOST_COMPARED]
    for (number, bag), places in keys.items():
        if number:
            lacking += len(places) * (sum(count for _, count in bag) < most[number])
        elif len(places) == 1:
            own = dict(bag)
            lacking += any(_is_part(own, other) for other in others if other != own)
    return lacking


def _is_part(bag: dict[int, int], other: dict[int, int]) -> bool:
    return len(bag) <= len(other) and all(count <= other.get(name, 0) for name, count in bag.items())


def _still(device: Columns, waits: Stretches, lonely: np.ndarray) -> int:
    """The longest time, in nanoseconds, that nothing ran right before or right after kernels of the graph launches
    `lonely`, although the call that launched what came next had returned, or the host still waited for the device. 0
    below STILL_NS."""
    if not len(lonely):
        return 0
    reach = np.maximum.accumulate(device["end"])
    last = np.maximum.accumulate(np.where(device["end"] == reach, np.arange(len(reach)), 0))  # who reached so far
    of_lonely = device["is_graph"] & np.isin(device["correlation"], lonely)
    idle_from, idle_to = reach[:-1], device["start"][1:]
    given = np.where(device["launched"], device["returned"], device["start"])[1:]
    beside = of_lonely[1:] | of_lonely[last[:-1]]
    with_work = np.where(beside, idle_to - np.maximum(idle_from, given), 0)
    longest = int(with_work.max(initial=0))
    if len(waits[0]):
        at = np.searchsorted(waits[0], idle_from, "right") - 1
        until = np.where(at >= 0, np.maximum.accumulate(waits[1])[np.maximum(at, 0)], idle_from)
        waited = np.where(of_lonely[last[:-1]], np.minimum(until, idle_to) - idle_from, 0)
        longest = max(longest, int(waited.max(initial=0)))
    return longest if longest > STILL_NS else 0
