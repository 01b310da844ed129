"""Two questions to the profiling script itself: what does measuring cost (`overhead`), and does another method say the
same (`kineto`)?"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .points import record_points
from .request import Request
from .timeline import Timeline, device_activity
from .workload import serve

KINETO_TOKENS = 64  # of each request under torch.profiler: thousands of steps would fill gigabytes


class _Blind(Timeline):
    """A timeline that notes nothing."""

    def add(self, *_: Any) -> None:
        pass

    def add_step(self, *_: Any) -> None:
        pass


def overhead(measuring, plain, requests: list[Request], pairs: int) -> dict[str, Any]:
    """What measuring costs: runs of the batcher `measuring` with all of it, and of `plain` (which may be the same one)
    with no span noted, in turns. share: the median over the pairs of time with / time without, less 1; ms_per_step: the
    same share of a step; pairs: each pair's own."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for pair in range(pairs):
        for with_all in (True, False) if pair % 2 else (False, True):
            if with_all:
                seconds[True].append(_timed(measuring, requests, record_points(measuring)))
                timeline = measuring.timeline
            else:
                plain._new_timeline = _Blind
                try:
                    seconds[False].append(_timed(plain, requests, contextlib.nullcontext()))
                finally:
                    del plain._new_timeline
    each = [with_ / without - 1 for with_, without in zip(seconds[True], seconds[False], strict=True)]
    share, steps = statistics.median(each), max(1, len(timeline.steps))
    return {"share": share, "ms_per_step": 1e3 * share * statistics.median(seconds[False]) / steps, "pairs": each}


def _timed(batcher, requests: list[Request], within: contextlib.AbstractContextManager) -> float:
    start = time.perf_counter()
    with within:
        serve(batcher, requests)
    return time.perf_counter() - start


def kineto(batcher, requests: list[Request]) -> dict[str, Any]:
    """Run once more under torch.profiler, at most KINETO_TOKENS of each request, and compare two methods on that run:
    busy, the union of kernels and copies in its trace; event_active, its steps between CUDA events. Both over the time
    from the end of the first step to the end of the last one. differs: by more than 2 points; note: in words."""
    from .traces import busy_in, read_trace  # the streaming JSON parser is needed for traces only

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
