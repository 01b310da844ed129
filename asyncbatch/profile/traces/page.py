"""What `--trace` found in a trace, as one page: a single HTML file like that of a measured run (`page.py`), with steps
and host work to zoom into, the idle time by cause and the longest gaps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..page import (
    Child,
    as_json,
    causes_table,
    document,
    milliseconds,
    percent,
    show_button,
    table,
    tag,
    timeline_part,
    write_html,
)
from .report import TraceReport, facts

SECTIONS = {
    "summary": "Summary",
    "timeline": "Timeline",
    "gaps": "Idle time by cause",
    "longest": "The longest gaps",
    "read": "How it was read",
}
MOST_CAUSES, MOST_GAPS = 12, 20


def write_trace_page(path: str | Path, report: TraceReport) -> None:
    """Write the page. OSError if the file cannot be written."""
    write_html(path, trace_page(report))


def trace_page(report: TraceReport) -> str:
    """The text of the page."""
    timeline = report.timeline()
    active = report.step_active
    if active is None:
        head = "Too few steps to say how idle the device was"
    else:
        head = f"Between its steps the device was idle for {percent(1 - active)} of the time"
    header = tag(
        "header",
        tag("p", f"asyncbatch.profile --trace: {report.label}", class_="about"),
        tag("h1", head),
        (tag("p", tag("strong", "Note: "), note, class_="notice") for note in report.notes),
    )
    parts: dict[str, Child] = {
        "summary": table("What the trace tells", ("", ("", "text")), [list(fact) for fact in facts(report)]),
        "timeline": timeline_part([timeline], report.label),
        "gaps": _gaps(report),
        "longest": _longest(report, timeline.origin),
        "read": _read(report),
    }
    return document(f"Trace of {report.label}", header, SECTIONS, parts)


def _gaps(report: TraceReport) -> Child:
    found: list[tuple[str, dict[str, Any]]] = []
    for where, idle_s in report.idle_s.items():
        if idle_s:
            causes = list(report.idle_by_cause(where == "inside steps").items())
            rest = sum(value for _, value in causes[MOST_CAUSES:])
            by = dict(causes[:MOST_CAUSES]) | ({f"{len(causes) - MOST_CAUSES} more": rest} if rest else {})
            found.append((where, {"idle_s": idle_s, "by": by}))
    if not found:
        return tag("p", "No idle time was found.")
    most = max(idle_s for _, gaps in found for idle_s in gaps["by"].values())
    text = "What the launching thread was doing while nothing of a step ran; this adds up to all of the idle time."
    return [tag("p", text), tag("div", (causes_table(where, gaps, most) for where, gaps in found), class_="runs")]


def _longest(report: TraceReport, origin: float) -> Child:
    longest = report.longest(MOST_GAPS)
    rows = []
    for gap in longest:
        if gap.seconds > 0.05 * longest[0].seconds:  # the others do not matter beside it
            place = f"{'inside' if gap.inside else 'before'} step\N{NO-BREAK SPACE}{gap.step}"
            look = show_button(f"Show the gap {place} in the timeline", gap.start - origin, gap.seconds)
            rows.append([place, milliseconds(1e3 * (gap.start - origin)), milliseconds(gap.ms), gap.cause, look])
    columns = ("where", "at", "idle for", ("cause", "text"), ("in the timeline", "live-only"))
    return table("Longest gaps", columns, rows) if rows else tag("p", "No gap was found.")


def _read(report: TraceReport) -> Child:
    return [
        tag("p", "Step active is the share of the time in which a step ran, from the end of the first step to the end "
            "of the last. Kernel busy is the share in which any kernel, copy or memset ran. A gap between two steps is "
            "all the time from the end of the one to the start of the other; inside a step it is time in which nothing "
            "ran. The host lane is the thread that launches the steps; without events of the CPU in the trace it is "
            "empty."),
        as_json(report.as_dict()),
    ]  # fmt: skip
