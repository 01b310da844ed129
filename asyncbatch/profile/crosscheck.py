"""Two checks of the profiling script itself: what does measuring cost (`overhead`), and does another method find the
same share of active time (`kineto`)?"""

from __future__ import annotations

import contextlib
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..measure.percentile import median_lies_within
from ..measure.point_recorder import override, record_points
from ..request import Request
from ..timeline import Timeline, device_activity
from .report import Kineto, Overhead
from .traces import read as traces
from .workload import serve_over_time

STRETCH = 10  # turns of the loop; some of them are not counted
PAIRS, ENOUGH_S = 40, 30.0
Serve = Callable[[list[Request]], Timeline]
KINETO_TOKENS = 64  # of each request under torch.profiler: thousands of steps would fill gigabytes


def overhead(measuring, plain, requests: list[Request]) -> Overhead | None:
    """What measuring costs a step.

    Two batchers of one kind serve the same requests: `measuring` notes latency points, `plain` notes not even a span,
    and where it was opened with timeline=False it records no timing events on CUDA either. They take turns, with
    STRETCH turns of the loop each, and a pair is two such stretches of the same steps. To compare whole runs would say
    less: two runs of the same batcher differ by more than the cost that is looked for.

    share: the median over the pairs of time with / time without, less 1; interval: where that median lies with 95 %
    confidence (None with fewer than 6 pairs); ms_per_step: the same share of a step; pairs: the share of each pair. A
    median shows what every step pays, not what happens once in a hundred steps, such as one more garbage collection.
    The requests are served again and again until there are PAIRS pairs or ENOUGH_S seconds have passed. None for
    requests that end within two or three steps: then there is nothing to compare."""
    times: list[tuple[float, float]] = []  # seconds a turn of each pair: with, without
    plain._new_timeline = functools.partial(Timeline, most_steps=0)
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
    ms_per_step = 1e3 * share * statistics.median(without for _, without in times)
    low, high, sure = median_lies_within(each) or (0.0, 0.0, 0.0)
    return Overhead(share, (low, high) if sure >= 0.95 else None, ms_per_step, tuple(each))


def _pairs(measuring, plain, requests: list[Request]) -> list[tuple[float, float]]:
    """One run of both batchers, in stretches: for each pair the seconds of a turn (with, without) measuring."""
    handles = []
    for batcher in (measuring, plain):
        batcher.run([])  # a new timeline
        handles += [batcher.submit(request) for request in requests]
    pairs, plain_first = [], False
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
            pairs.append((statistics.mean(counted[0]), statistics.mean(counted[1])))
    for handle in handles:
        if handle.completion.error is not None:
            raise handle.completion.error
    return pairs


def kineto(
    batcher, requests: list[Request], serve: Serve | None = None, all_of: Callable[[bool], bool] = bool
) -> tuple[Kineto, dict[int, float]]:
    """Run once more under torch.profiler, at most KINETO_TOKENS of each request, and compare two methods on that run.

    busy: the union of kernels and copies in its trace; event_active: its steps between CUDA events. Both are shares of
    the time from the end of the first step to the end of the last one. differs: by more than 2 points; note: in words.
    Where the profiler lost events, the run is made again with a quarter of the tokens, which it may not lose; after the
    last one busy is None and the note says what is missing. ValueError for a run of fewer than two steps.

    Returned too: for each step of the run the seconds in which a kernel of a collective ran; empty where the trace does
    not show the same steps. serve: runs the batcher (None: as `serve_over_time`), and gives the timeline. all_of: of
    several ranks, whether something is true on all of them."""
    serve = serve or functools.partial(_served, batcher)
    for most in (KINETO_TOKENS, KINETO_TOKENS // 4, KINETO_TOKENS // 16):
        trace, timeline = _profiled(batcher, requests, most, serve)
        if all_of(trace.coverage.complete):
            break
    _, numbers, starts, ends = timeline.lane("compute")
    in_steps = trace.collectives_in_steps_s if trace.coverage.complete and len(trace.steps) == len(numbers) else []
    in_collectives = dict(zip(numbers.tolist(), in_steps, strict=False))
    active_s, period_s = device_activity(starts, ends)
    if period_s <= 0:
        raise ValueError("--kineto needs a run of two steps or more: take a larger --new-tokens")
    if not trace.coverage.complete:
        note = f"the profiler lost events, so that kernel busy is not told: {'; '.join(trace.coverage.problems())}"
        return Kineto(None, None, active_s / period_s, None, trace.num_kernels, note), in_collectives
    busy = traces.busy_in(trace, float(trace.steps[0, 1]), float(trace.steps[-1, 1]))
    return kineto_result(busy, active_s / period_s, trace, len(starts)), in_collectives


def _served(batcher, requests: list[Request]) -> Timeline:
    serve_over_time(batcher, requests)
    return batcher.timeline


def _profiled(batcher, requests: list[Request], most: int, serve: Serve) -> tuple[Any, Timeline]:
    """(the report on its trace, the timeline) of one more run, of at most so many new tokens of each request."""
    few = [replace(request, max_new_tokens=min(request.max_new_tokens, most)) for request in requests]
    cuda = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=cuda) as profiler, _replays(batcher) as graphs:
        timeline = serve(few)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return traces.read_trace(path, graphs=graphs), timeline


@contextlib.contextmanager
def _replays(batcher) -> Iterator[list[int] | None]:
    """Which graph is replayed, each time that one is: a number from 1 for each kind of step, whose graphs are alike for
    all slots. A kind may come only once, and its kernels be some of another kind's: then the trace alone cannot tell
    that nothing is missing. None for a batcher whose graphs are not known here."""
    program: Any = getattr(getattr(batcher, "device", None), "program", None)
    graphs = getattr(program, "graphs", None)
    if not graphs:
        yield None
        return
    numbers = {kind: number for number, kind in enumerate(dict.fromkeys(kind for _, kind in graphs), 1)}
    replayed: list[int] = []
    run = program.run

    def noted(command: Any, slot: int) -> None:
        if (slot, command) in graphs:
            replayed.append(numbers[command])
        run(command, slot)

    with override(program, "run", noted):
        yield replayed


def kineto_result(busy: float, active: float, trace: Any, steps: int) -> Kineto:
    """The two methods side by side, and what to think of them. `trace`: a TraceReport; `steps`: how many steps ran.

    step_active: a third number between the two, from each step's first kernel to its last one; None where the trace
    shows another number of steps."""
    step_active = trace.step_active if len(trace.steps) == steps else None
    differs = abs(busy - active) > 0.02
    note = _kernels_seen(trace, steps)
    if differs:
        note += "; THE TWO METHODS DISAGREE by more than 2 points" + _reason(busy, step_active, active)
    return Kineto(busy, step_active, active, differs, trace.num_kernels, note)


def _kernels_seen(trace: Any, steps: int) -> str:
    """Whether the profiler saw the kernels of replayed CUDA graphs."""
    replays = trace.graph_launches
    if replays is None:
        note = "the trace does not say which kernels came from graph replays"
    else:
        note = f"{replays[0]} graph replays, {replays[1]} of {trace.num_kernels} kernels in them"
    if trace.num_kernels < steps:
        note += f"; fewer kernels than the {steps} steps: the profiler did not see into the graphs"
    return note


def _reason(busy: float, step_active: float | None, active: float) -> str:
    """Why the two methods may disagree."""
    if step_active is None:
        return (
            ": between the kernels of a step the device is idle too, which events around the step cannot see, and "
            "the profiler slows the host down"
        )
    return (
        f". From the first kernel of each step to its last one, {step_active:.2%}: "
        f"{100 * (active - step_active):.1f} points less than by the events, which are passed before a launch has "
        f"reached the idle stream (the profiler makes launches slower); the other {100 * (step_active - busy):.1f} "
        "points are gaps between the kernels of a step"
    )
