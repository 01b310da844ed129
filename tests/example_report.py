"""Reports with every part filled in, for the tests of the page and of the schema.

`grown` adds to a report what a version of `report.report` does not have yet, computed from the timelines by rules that
are simpler than the real ones: they give numbers of the right form that add up, and nothing here checks the real ones.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from asyncbatch.timeline import Timeline

RUN_KEYS = ("points", "gaps", "what_if", "prediction", "interrupted", "kineto", "overhead", "latency")


def grown(report: dict[str, Any], timelines: list[Timeline]) -> dict[str, Any]:
    report = copy.deepcopy(report)
    report["schema"] = 3
    for row, timeline in zip(report["runs"], timelines, strict=True):
        points = points_of(timeline)
        new = {"points": points, "gaps": gaps_of(timeline), "interrupted": False, "kineto": None, "overhead": None}
        new |= {"latency": None, "prediction": prediction_of(timeline), "what_if": what_if_of(timeline, points)}
        for key in RUN_KEYS:
            row.setdefault(key, new[key])
    if report["runs"]:
        best = max(report["runs"][0]["what_if"], key=lambda entry: entry["sync_saves"])
        report.setdefault(
            "first",
            f"Eliminate this first: {best['point']}. Without it the synchronous run would take "
            f"{best['sync_s']:.3f} s, {best['sync_saves']:.1%} less.",
        )
        report.setdefault("verdict", report["runs"][0]["prediction"]["text"])
    report.setdefault("first", "Nothing was measured.")
    report.setdefault("verdict", "")
    return report


def points_of(timeline: Timeline) -> list[dict[str, Any]]:
    wall_s, found = timeline.summary().wall_s, {}
    for span in timeline.spans:
        found.setdefault(("host" if span.lane == "host" else "device", span.name), []).append(span.end - span.start)
    return [
        {
            "name": name,
            "where": where,
            "median_ms": 1e3 * float(np.median(times)),
            "p99_ms": 1e3 * float(np.quantile(times, 0.99)),
            "total_s": sum(times),
            "share": sum(times) / wall_s,
        }
        for (where, name), times in found.items()
    ]


def gaps_of(timeline: Timeline) -> dict[str, Any]:
    by: dict[str, float] = {}
    longest, gaps, origin = [], timeline.gaps(), timeline.origin
    for gap in gaps:
        rest = gap.seconds - sum(gap.host_s.values())
        causes = {**gap.host_s, **({"between the parts": rest} if rest > 0 else {})}
        for name, idle_s in causes.items():
            by[name] = by.get(name, 0.0) + idle_s * gap.seconds / sum(causes.values())
        cause = max(causes, key=causes.__getitem__)
        longest.append({"step": gap.step, "at_s": gap.start - origin, "ms": 1e3 * gap.seconds, "cause": cause})
    longest.sort(key=lambda gap: -gap["ms"])
    return {"idle_s": sum(gap.seconds for gap in gaps), "by": by, "longest": longest[:6]}


def _totals(timeline: Timeline) -> tuple[float, float]:
    """Seconds of host work, and of device steps."""
    work = [span for span in timeline.spans if span.lane == "host" and span.name != "wait"]
    steps = [span for span in timeline.spans if span.lane == "compute"]
    return tuple(sum(span.end - span.start for span in spans) for spans in (work, steps))


def prediction_of(timeline: Timeline) -> dict[str, Any]:
    host_s, device_s = _totals(timeline)
    sync_s, async_s = host_s + device_s, max(host_s, device_s)
    gain = sync_s / async_s
    text = f"Asynchronous batching would take {1 - 1 / gain:.1%} less time than synchronous."
    return {"sync_s": sync_s, "async_s": async_s, "gain": gain, "helps": gain > 1.02, "text": text}


def what_if_of(timeline: Timeline, points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    host_s, device_s = _totals(timeline)
    entries = []
    for point in points:
        if point["name"] in ("wait", "copy_in", "copy_out"):
            continue
        for factor in (0.0, 0.5):
            less = (1 - factor) * point["total_s"]
            host, device = (host_s - less, device_s) if point["where"] == "host" else (host_s, device_s - less)
            entry = {"point": point["name"], "factor": factor, "sync_s": host + device, "async_s": max(host, device)}
            entry["sync_saves"] = 1 - entry["sync_s"] / (host_s + device_s)
            entry["async_saves"] = 1 - entry["async_s"] / max(host_s, device_s)
            entries.append(entry)
    return entries
