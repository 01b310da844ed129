"""Two questions to the profiling script itself: what does measuring cost (`overhead`), and does another method say the
same (`kineto`)?"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..measure.point_recorder import record_points
from ..request import Request
from ..timeline import Timeline, device_activity
from .workload import serve

STRETCH = 10  # turns of the loop; some of them are not counted
PAIRS, ENOUGH_S = 40, 30.0
KINETO_TOKENS = 64  # of each request under torch.profiler: thousands of steps would fill gigabytes


class _Blind(Timeline):
    """A timeline that notes nothing."""

    def add(self, *_: Any) -> None:
        pass

    def add_step(self, *_: Any) -> None:
        pass


def overhead(measuring, plain, requests: list[Request]) -> dict[str, Any] | None:
    """What measuring costs: two batchers of one kind serve the same requests, `measuring` with latency points noted and
    `plain` with not even a span, STRETCH turns of the loop each, in turns. A pair is two such stretches of the same
    steps. Whole runs after each other tell less: they differ more, with nothing changed, than what is looked for.

    share: the median over the pairs of time with / time without, less 1; interval: where that median lies with 95 %
    confidence (null from fewer than 6 pairs); ms_per_step: the same share of a step; pairs: each pair's own. A median
    tells what every step pays, not what comes once in a hundred, such as another garbage collection.
    The requests are served again until there are PAIRS pairs or ENOUGH_S are over. None for requests that end within
    two or three steps: there is nothing to compare then."""
    times: list[tuple[float, float]] = []  # seconds a turn of each pair: with, without
    plain._new_timeline = _Blind
    begun = time.perf_counter()
    try:
        with record_points(measuring):
            while len(times) < PAIRS and time.perf_counter() - begun < ENOUGH_S:
                times += _pairs(measuring, plain, requests)
    finally:
        del plain._new_timeline
    if not times:
        return None
    each = [with_ / without - 1 for with_, without in times]
    share = statistics.median(each)
    return {
        "share": share,
        "interval": _median_lies_within(sorted(each)),
        "ms_per_step": 1e3 * share * statistics.median(without for _, without in times),
        "pairs": each,
    }


def _pairs(measuring, plain, requests: list[Request]) -> list[tuple[float, float]]:
    """One run of both, in stretches: (seconds a turn with, without) of each pair."""
    handles = []
    for batcher in (measuring, plain):
        batcher.run([])  # a new timeline
        handles += [batcher.submit(request) for request in requests]
    found, plain_first = [], False
    while any(handle.completion is None for handle in handles):
        plain_first = not plain_first
        seconds: dict[Any, list[float]] = {measuring: [], plain: []}
        for batcher in (plain, measuring) if plain_first else (measuring, plain):
            for _ in range(STRETCH):
                start = time.perf_counter()
                if batcher.turn():
                    seconds[batcher].append(time.perf_counter() - start)
        # The first turns find the other batcher's steps on the device, and its data in the caches.
        counted = [seconds[batcher][len(batcher.slots) + 1 :] for batcher in (measuring, plain)]
        if counted[0] and len(counted[0]) == len(counted[1]):
            found.append((statistics.mean(counted[0]), statistics.mean(counted[1])))
    for handle in handles:
        if handle.completion.error is not None:
            raise handle.completion.error
    return found


def _median_lies_within(ordered: list[float]) -> list[float] | None:
    """The 95 % confidence interval of the median of `ordered` values, whatever their distribution: how many of them lie
    below the true median is a binomial number of chance 1/2 (the sign test). Fewer than 6 have none: None."""
    count, below = len(ordered), -1
    while 2 * sum(math.comb(count, number) for number in range(below + 2)) <= 0.05 * 2**count:
        below += 1
    return None if below < 0 else [ordered[below], ordered[count - 1 - below]]


def kineto(batcher, requests: list[Request]) -> dict[str, Any]:
    """Run once more under torch.profiler, at most KINETO_TOKENS of each request, and compare two methods on that run:
    busy, the union of kernels and copies in its trace; event_active, its steps between CUDA events. Both over the time
    from the end of the first step to the end of the last one. differs: by more than 2 points; note: in words."""
    from .traces.read import busy_in, read_trace  # the streaming JSON parser is needed for traces only

    few = [replace(request, max_new_tokens=min(request.max_new_tokens, KINETO_TOKENS)) for request in requests]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        serve(batcher, few)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = read_trace(path)
    _, _, starts, ends = batcher.timeline.lane("compute")
    active_s, period_s = device_activity(starts, ends)
    if period_s <= 0:
        raise ValueError("--kineto needs a run of two steps or more: take a larger --new-tokens")
    busy = busy_in(trace, float(trace.steps[0, 1]), float(trace.steps[-1, 1]))
    return kineto_result(busy, active_s / period_s, trace, len(starts))


def kineto_result(busy: float, active: float, trace: Any, steps: int) -> dict[str, Any]:
    """The two methods side by side, and what to think of them. `trace`: a TraceReport; `steps`: steps that were run.
    step_active: between the two, from each step's first kernel to its last one; None where the trace shows others."""
    replays = trace.graph_launches
    if replays is None:
        said = "the trace does not say which kernels came from graph replays"
    else:
        said = f"{replays[0]} graph replays, {replays[1]} of {trace.num_kernels} kernels in them"
    if trace.num_kernels < steps:
        said += f"; fewer kernels than the {steps} steps: the profiler did not see into the graphs"
    found = trace.step_active if len(trace.steps) == steps else None
    differs = abs(busy - active) > 0.02
    if differs:
        said += "; THE TWO METHODS DISAGREE by more than 2 points"
        if found is None:
            said += (
                ": between the kernels of a step the device is idle too, which events around the step cannot see, and "
                "the profiler slows the host down"
            )
        else:
            said += (
                f". From the first kernel of each step to its last one, {found:.2%}: "
                f"{100 * (active - found):.1f} points less than by the events, which are passed before a launch has "
                f"reached the idle stream (the profiler makes launches slower); the other {100 * (found - busy):.1f} "
                "points are gaps between the kernels of a step"
            )
    numbers = {"busy": busy, "step_active": found, "event_active": active}
    return {**numbers, "differs": differs, "kernels": trace.num_kernels, "note": said}
