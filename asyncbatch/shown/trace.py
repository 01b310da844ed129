"""Timelines as a Chrome trace (JSON), which https://ui.perfetto.dev opens, and back."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .files import whole_file


def write(
    path: str | Path, timelines: Sequence[Any], lanes: Sequence[str], origins: Sequence[float] | None = None
) -> None:
    """Write the timelines into one file, as processes 1, 2, ..., each of which begins at time 0. lanes: what every
    process shows, from the top; the first is the host's, the others are those of the device. origins: of each timeline
    the moment that is 0 in the file, where that is not its own beginning.

    Arrows ("flow events") lead from the copy in of a step to the step, and on to its copy out."""
    events: list[dict[str, Any]] = []
    notes = []
    flows = itertools.count(1)  # numbers of arrows, not used twice in a file: Perfetto would join two runs
    zeros = [timeline.origin for timeline in timelines] if origins is None else origins
    for pid, (timeline, origin) in enumerate(zip(timelines, zeros, strict=True), 1):
        spans = timeline.spans
        notes.append(_note(timeline, pid, origin))
        title = f"{timeline.label or 'timeline'} ({timeline.clock} clock{timeline.cut})"
        events.append({"ph": "M", "pid": pid, "name": "process_name", "args": {"name": title}})
        events.append({"ph": "M", "pid": pid, "name": "process_sort_index", "args": {"sort_index": pid}})
        tids = {lane: 100 * pid + i for i, lane in enumerate(dict.fromkeys([*lanes, *(span.lane for span in spans)]))}
        for lane, tid in tids.items():
            where = {"ph": "M", "pid": pid, "tid": tid}
            events.append({**where, "name": "thread_name", "args": {"name": lane}})
            events.append({**where, "name": "thread_sort_index", "args": {"sort_index": tid}})
        slices: dict[int, dict[str, dict[str, Any]]] = {}  # step -> device lane -> its first event
        for lane, name, step, start, end in spans:
            # ts and dur are microseconds, for the viewer. Both ends are rounded alike, so that neighbours still touch.
            # args keeps the exact seconds, for `read`.
            ts, stop = round(1e6 * (start - origin), 3), round(1e6 * (end - origin), 3)
            args = {"step": step, "start_s": start, "end_s": end}
            event = {"ph": "X", "pid": pid, "tid": tids[lane], "name": name, "cat": lane}
            events.append({**event, "ts": ts, "dur": round(stop - ts, 3), "args": args})
            if lane in lanes[1:]:
                slices.setdefault(step, {}).setdefault(lane, events[-1])
        for of_step in slices.values():
            if len(of_step) == len(lanes[1:]):
                events += _arrows([of_step[lane] for lane in lanes[1:]], next(flows))
    trace = {"traceEvents": events, "displayTimeUnit": "ms", "metadata": {"asyncbatch": notes}}
    with whole_file(path) as beside:
        beside.write_text(json.dumps(trace, allow_nan=False), encoding="utf-8")


def _note(timeline: Any, pid: int, origin: float) -> dict[str, Any]:
    """What no event of the trace says of a timeline."""
    note = {"pid": pid, "label": timeline.label, "clock": timeline.clock, "origin": origin}
    note["steps"] = [list(step) for step in timeline.steps]
    if timeline.dropped:
        totals = {key: value for key, value in asdict(timeline.totals).items() if math.isfinite(value)}
        note |= {"most_steps": timeline.most_steps, "dropped": timeline.dropped, "totals": totals}
    return note


def _arrows(slices: Sequence[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """The arrows through the slices ("X" events) of a step, as flow events with this number. None at all if one of them
    would lead back in time.

    The viewer ties a flow event to the slice that is open on its thread at that time. So each stands in the middle of
    its slice: at one of its ends, it could be tied to the neighbour that touches it."""
    times = [round(event["ts"] + event["dur"] / 2, 3) for event in slices]
    if times != sorted(times):
        return []
    flow = {"name": f"step {slices[0]['args']['step']}", "cat": "flow", "id": number, "bp": "e"}
    return [
        {"ph": phase, "pid": event["pid"], "tid": event["tid"], "ts": ts, **flow}
        for phase, event, ts in zip("stf", slices, times, strict=True)
    ]


def read(path: str | Path, timeline: Callable[..., Any]) -> list[Any]:
    """What `timeline` makes of each that `write` wrote into the file: it is given `label`, `clock`, `steps` and
    `spans`, and of one that had dropped steps `most_steps`, `dropped` and `totals`. ValueError if the file holds
    anything else."""
    expected = "expected a Chrome trace written by Timeline.save (JSON with traceEvents and metadata.asyncbatch)"
    try:
        trace = json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); {expected}") from None
    if not isinstance(trace, dict):
        raise ValueError(f"{path} holds a JSON {type(trace).__name__}; {expected}")
    try:
        notes = {note["pid"]: {"spans": [], **note} for note in trace["metadata"]["asyncbatch"]}
        for event in trace["traceEvents"]:
            if event["ph"] == "X":
                args = event["args"]
                span = event["cat"], event["name"], args["step"], args["start_s"], args["end_s"]
                notes[event["pid"]]["spans"].append(span)
        known = ("label", "clock", "steps", "spans"), ("most_steps", "dropped", "totals")
        return [
            timeline(**{key: note[key] for key in known[0]}, **{key: note[key] for key in known[1] if key in note})
            for note in notes.values()
        ]
    except (KeyError, TypeError) as error:
        problem = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is JSON with the keys {sorted(trace)}, but {problem}; {expected}") from None
