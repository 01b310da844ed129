"""The report on a trace (`--trace`) as one page: a single HTML file like that of a measured run.

Steps and host work can be zoomed into; beside them stand the idle time by cause and the longest gaps.
"""

from __future__ import annotations

import json
from pathlib import Path

from ...pictures import plot
from ..document import (
    Cell,
    Column,
    ShowButton,
    Table,
    causes_table,
    milliseconds,
    percent,
    render,
    timeline_view,
    write_html,
)
from ..outputs import Output, make_folder, write_all, write_json
from .ranks import Ranks
from .report import TraceReport
from .text import answers, facts

SECTIONS = {
    "summary": "Summary",
    "timeline": "Timeline",
    "gaps": "Idle time by cause",
    "longest": "The longest gaps",
    "read": "How it was read",
}
MOST_CAUSES, MOST_GAPS = 12, 20


def write_trace(folder: Path, report: TraceReport) -> None:
    """Write the page, the report as JSON and, unless events are missing, the picture.

    OutError if a file cannot be written."""
    outputs = [
        Output("report.html", lambda path: write_trace_page(path, report)),
        Output("report.json", lambda path: write_json(path, report.as_dict())),
    ]
    if report.coverage.complete:  # the caption says how idle the device was
        picture = plot(report.timeline(), title=f"{report.label}, device {report.device}")
        outputs.append(Output("trace-timeline.png", picture.savefig))
    write_all(folder, outputs)


def write_traces(folder: Path, ranks: Ranks) -> None:
    """Write one report of all as JSON, and for each what `write_trace` writes, in a folder of its own."""
    write_all(folder, [Output("report.json", lambda path: write_json(path, ranks.as_dict()))])
    numbers = [report.rank for report in ranks.reports]
    by_number = None not in numbers and len(set(numbers)) == len(numbers)
    for at, report in enumerate(ranks.reports):
        own = folder / f"rank-{report.rank if by_number else at}"
        make_folder(own)
        write_trace(own, report)


def write_trace_page(path: str | Path, report: TraceReport) -> None:
    """Write the page. OSError if the file cannot be written."""
    write_html(path, trace_page(report))


def trace_page(report: TraceReport) -> str:
    """The text of the page."""
    timeline = report.timeline()
    shown = [timeline] if report.coverage.complete else []  # its caption says how idle the device was
    return render(
        "trace.html.j2",
        SECTIONS,
        title=f"Trace of {report.label}",
        label=report.label,
        heading=_heading(report),
        answers=list(answers(report).items()),
        notes=report.notes,
        summary=Table.of("What the trace tells", ("", Column("", "text")), list(facts(report))),
        timeline=timeline_view(shown),
        gaps=_gaps(report),
        nothing="No gap was found." if report.coverage.complete else "Not told: events of the device are missing.",
        longest=_longest(report, timeline.origin),
        json=json.dumps(report.as_dict(), indent=1),
    )


def _heading(report: TraceReport) -> str:
    if not report.coverage.complete:
        return "How idle the device was is not told: events are missing from this trace"
    if report.step_active is None:
        return "Too few steps to say how idle the device was"
    return f"Between its steps the device was idle for {percent(1 - report.step_active)} of the time"


def _gaps(report: TraceReport) -> list[list[Table]]:
    """For the gaps between steps and those inside steps, as far as there are any: idle time by cause."""
    parts: list[tuple[str, float, dict[str, float]]] = []
    for where, idle_s in report.idle_s.items():
        if idle_s:
            causes = list(report.idle_by_cause(where == "inside steps").items())
            rest = sum(value for _, value in causes[MOST_CAUSES:])
            by = dict(causes[:MOST_CAUSES]) | ({f"{len(causes) - MOST_CAUSES} more": rest} if rest else {})
            parts.append((where, idle_s, by))
    most_s = max((seconds for _, _, by in parts for seconds in by.values()), default=0.0)
    return [[causes_table(where, by, idle_s, most_s)] for where, idle_s, by in parts]


def _longest(report: TraceReport, origin: float) -> Table:
    longest = report.longest(MOST_GAPS)
    rows: list[list[Cell]] = []
    for gap in longest:
        if gap.seconds > 0.05 * longest[0].seconds:  # the others do not matter beside it
            place = f"{'inside' if gap.inside else 'before'} step\N{NO-BREAK SPACE}{gap.step}"
            start_s = gap.start - origin
            look = ShowButton.around(f"Show the gap {place} in the timeline", start_s, gap.seconds)
            rows.append([place, milliseconds(1e3 * start_s), milliseconds(gap.ms), gap.cause, look])
    columns = ("where", "at", "idle for", Column("cause", "text"), Column("in the timeline", "live-only"))
    return Table.of("Longest gaps", columns, rows)
