"""Notebook 06: a recorded H200 and its host, replayed on the virtual clock, where every time is exact; a trace with a
culprit in it; and the mended code on the reader's own host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import MethodType
from typing import Any

import numpy as np

from ..batcher import AsyncBatcher, SyncBatcher
from ..measure import points_of, record_points
from ..measure.recording import Recording
from ..measure.simulate import Prediction, costs_of, predict, what_if
from ..measure.steps import steps_of
from ..request import Request
from ..timeline import Timeline

NAME, ROWS = "h200-llama-8b", 32
PAUSED = "h200-8b-with-a-pause"
CULPRIT_S = 2e-3  # what `fill` takes in the trace that is sent
LOOPS = {"sync": SyncBatcher, "async": AsyncBatcher}


def _requests() -> list[Request]:
    return [Request([1] * 16, max_new_tokens=64, stop_token_ids=())] * ROWS


def replayed(loop: str, **changes: Any) -> Timeline:
    """A run of 32 requests on the virtual clock, with the times of the recorded H200 and its host.

    loop: "sync" or "async"; another one is a ValueError. changes: of the recorded costs, in seconds, such as
    fill=2e-3 (see `devices.virtual.Costs`)."""
    if loop not in LOOPS:
        raise ValueError(f"there is no loop {loop!r}; there are {', '.join(LOOPS)}")
    recording = Recording.load(NAME)
    costs = replace(recording.costs(ROWS), **changes)
    options: dict[str, Any] = {"max_batch_size": ROWS, "max_length": 128, "clock": costs, "step_s": 0.0}
    with LOOPS[loop](recording.stand_in_model(), **options) as batcher, record_points(batcher):
        batcher.run(_requests())
    return batcher.timeline


def intervals(timeline: Timeline) -> tuple[np.ndarray, np.ndarray]:
    """When the device did anything: starts and ends (seconds) of all steps and copies, lane by lane."""
    lanes = [timeline.lane(lane) for lane in ("H2D", "compute", "D2H")]
    starts, ends = (np.concatenate([lane[column] for lane in lanes]) for column in (2, 3))
    return starts, ends


def sent_trace() -> Timeline:
    """A synchronous run in which one part of the host's work got slow."""
    return replayed("sync", fill=CULPRIT_S)


def without(timeline: Timeline, part: str) -> str:
    """In words: what the run of a timeline would take if a part of the host's work took no time. A part that is none
    is named as such."""
    saved = {one.point: one for one in what_if(timeline) if one.factor == 0 and one.where == "host"}
    if part not in saved:
        return f"{part!r} is no part of the host's work; these are: {', '.join(sorted(saved))}"
    one, now = saved[part], 1e3 * timeline.summary().wall_s
    return f"now {now:.1f} ms; without {part} {1e3 * one.sync_s:.1f} ms, which is {one.sync_saves:.1%} less"


def simulated(timeline: Timeline) -> Prediction:
    """What the asynchronous loop would make of a synchronous run."""
    return predict(costs_of(timeline))


def on_your_host(tables: Callable[[Any, Any], Any]) -> Timeline:
    """A synchronous run whose host is this machine, beside the recorded H200. tables: in place of `KVCache.tables`."""
    recording = Recording.load(NAME)
    options: dict[str, Any] = {"max_batch_size": ROWS, "max_length": 8208, "step_s": recording.step_times(ROWS)}
    with SyncBatcher(recording.stand_in_model(), **options) as batcher:
        batcher.kv.tables = MethodType(tables, batcher.kv)  # type: ignore[method-assign]
        with record_points(batcher):
            batcher.run(_requests())
    return batcher.timeline


def compared(before: Timeline, after: Timeline) -> str:
    """How long filling took in two runs, in words; and if the second is not clearly faster, that something disturbed
    it."""
    old, new = (
        next(point.median_ms for point in points_of(timeline) if point.name == "fill buffers")
        for timeline in (before, after)
    )
    text = f"fill buffers, median of the steps: {old:.3f} ms before, {new:.3f} ms after"
    return text if old > 2 * new else f"{text}\nDisturbed, run me again: something else kept this machine busy."


def two_engines() -> dict[tuple[str, str], dict[str, Any]]:
    """The totals of both engines' runs of the 8B shape, recorded on one H200: by (engine, mode)."""
    return {(run["engine"], run["mode"]): steps_of(run).totals() for run in Recording.load(NAME).runs}


def recorded_gaps() -> tuple[np.ndarray, np.ndarray]:
    """(idle gap before, time on the device of) each decode step, in ms, float64 [511] each: of the recorded run that is
    far off the law, an 8B model on an H200, one row, synchronous. It has the longest gap of all: it is of the code of
    2026-11-24, which let the garbage collector look at old objects (`devices/garbage.py` came after it)."""
    run = next(each for each in Recording.load(PAUSED).runs if each["mode"] == "sync")
    steps = steps_of(run)
    decode = steps.kind == "decode"
    return 1e-3 * steps.gap_us[decode], 1e-3 * steps.device_us[decode]
