"""The report as one page: a single HTML file that opens from disk, without a network, in any browser.

`write_page(path, report, timelines)` puts everything inside: the numbers of the report, the timeline to zoom, drag and
hover over (`static/timeline.js`, the code of the notebooks' widget), and a picture of it for print and for a reader
without scripts. What a report does not have is left out, or said to be missing.

Here it is decided what stands on the page, in words and tables; `templates/report.html.j2` makes HTML of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..measure.points import MEANING
from ..timeline import Timeline
from . import rank_words, side_by_side
from .document import (
    Cell,
    Column,
    Meter,
    ShowButton,
    Table,
    milliseconds,
    percent,
    ratio,
    render,
    seconds,
    signed,
    timeline_view,
    write_html,
)
from .rank_times import RankTimes
from .report import (
    OWN,
    Conditions,
    Gpu,
    IdleTime,
    Kineto,
    Latency,
    PointTimes,
    Prediction,
    Report,
    Run,
    Totals,
    WhatIf,
    workload_key,
    workload_words,
)
from .text import (
    FLOOR_ROWS,
    LATENCY_ROWS,
    LATER_FLOOR_ROWS,
    LATER_ROWS,
    ROWS,
    by_the_law,
    cost_in_words,
    number,
    with_hundredths,
    without_floor,
)
from .verdict import who

SECTIONS = {
    "summary": "Summary",
    "timeline": "Timeline",
    "gaps": "Idle gaps by cause",
    "what-if": "What if",
    "points": "Latency points",
    "measured": "How it was measured",
}
WORDS = (
    ("Device active", "time that the compute stream has a step running / wall time, over the decode steps."),
    ("Idle", "1 - active: over the decode steps, the time between the end of a step and the start of the next one."),
    ("Kernel busy", "union of kernel and copy intervals from the profiler / wall time over the same window."),
    ("Host work", "host time of a step that is not waiting; the table has the median over the decode steps."),
    (
        "Floor of the requests",
        "the least time that they need with so many rows: decode steps read the weights and the "
        "keys and values once, prompts take the time of their matrix products or of one reading of the weights.",
    ),
    ("Longest gap", "the longest that the device was idle between two steps of any kind."),
    ("Wasted token", "a token computed for a request that had finished already."),
)
NamedRun = tuple[str, Run]  # what a run is called on the page, and the run
MOST_COLUMNS = 6  # of a table with a column for each run; of more runs it has a line each


def write_page(
    path: str | Path, report: Report, timelines: Sequence[Timeline], ranks: Sequence[Sequence[RankTimes]] = ()
) -> None:
    """Write the page of a report and of the timelines of its runs; there may be none. ranks: of each run what its ranks
    did, where there are several.

    Of more than `document.MOST_SPANS` spans the page keeps that many, and says which (see `TimelineFigure.packed`).
    OSError if the file cannot be written."""
    write_html(path, page(report, timelines, ranks))


def page(report: Report, timelines: Sequence[Timeline], ranks: Sequence[Sequence[RankTimes]] = ()) -> str:
    """The text of the page, see `write_page`."""
    runs = named_runs(report)
    explained = [(name + ", rank 0" if run.ranks else name, run) for name, run in runs]
    return render(
        "report.html.j2",
        SECTIONS,
        title=f"Profile of {report.model or 'an unknown model'} on {report.device or 'an unknown device'}",
        header=_header(report),
        summary=_summary(report, runs),
        timeline=timeline_view(timelines, ranks),
        gaps=_gaps(explained),
        what_if=_what_if(explained),
        points=[_points(name, run.points) for name, run in explained if run.points],
        meanings=_meanings(runs),
        facts=_facts(report, runs),
        words=WORDS,
        json=json.dumps(report.to_json(), indent=1),
    )


def named_runs(report: Report) -> list[NamedRun]:
    """The runs by name: mode, and where they differ in it also engine and workload."""

    def differ(*keys: str) -> bool:
        return len({tuple(getattr(run, key) for key in keys) for run in report.runs}) > 1

    engine, workload = differ("engine"), differ("workload", "model", "batch_size")
    names = []
    for run in report.runs:
        where = f"{workload_words(run)}: " if workload else ""
        names.append(where + (f"{run.engine} " if engine else "") + str(run.mode))
    return list(zip(names, report.runs, strict=True))


# ---- the header ---------------------------------------------------------------------------------------------------


class Header(NamedTuple):
    """What stands at the top; notices are (in bold, the rest)."""

    about: str
    heading: str
    verdicts: list[str]
    notices: list[tuple[str, str]]


def _header(report: Report) -> Header:
    about = ", ".join(text for text in (report.model, report.device, report.date) if text)
    first, *verdicts = report.sentences or [f"Profile of {report.model or 'an unknown model'}"]
    heading, stop, rest = first.partition(". ")
    heading, verdicts = heading + stop.strip(), [rest] * bool(rest) + verdicts
    return Header(about, heading, verdicts, list(_notices(report)))


def _notices(report: Report) -> Iterator[tuple[str, str]]:
    """What has to be known before any number is read."""
    workload = report.workload
    if report.same_tokens is False and not any("tokens differ" in one for one in report.trust or ()):
        yield "The tokens differ.", "That is a fault, and the comparison is void."
    for engine, same in report.peers_same_tokens.items():
        if not same:
            yield "The tokens differ.", f"{engine}: sync and async gave different tokens."
    if any(run.interrupted for run in report.runs):
        yield "Interrupted.", "The numbers are of what ran until then, and the runs may have served different requests."
    real = "and nothing was computed. The host's work is real and this machine's."
    if report.emulated:
        yield "Emulated device.", f"The device's times come from the recording {report.emulated}, {real}"
    if workload.step_ms is not None:
        yield "Timed device.", f"Each step takes {workload.step_ms:g} ms by definition, {real}"
    if workload.host_work_ms:
        yield "Host work added.", f"{workload.host_work_ms:g} ms of Python were burnt in each step on request."
    if workload.over_time:
        bounds = "that bounds wall time and tokens per second, so compare the latencies."
        yield "Requests arrive over time", f"({workload.arrivals}): {bounds}"
    for note in dict.fromkeys(rank_words.clock_note(run.ranks) for run in report.runs if run.ranks):
        if note:
            yield "Two clocks.", note
    for failed in report.failed:
        which = (failed.workload, failed.engine, failed.mode, failed.model, failed.batch_size)
        yield "Not measured:", f"{', '.join(str(one) for one in which if one)}: {failed.error}"


# ---- the summary --------------------------------------------------------------------------------------------------


class Summary(NamedTuple):
    """All runs side by side (None without runs), a sentence about them, and further tables."""

    runs: Table | None
    sentence: str
    others: list[Table]


def _summary(report: Report, runs: list[NamedRun]) -> Summary:
    columns: list[tuple[str, Totals]] = [*runs, *((f"recorded {run.mode}", run) for run in report.recorded)]
    if not columns:
        return Summary(None, "", [])
    lines = _lines([run for _, run in columns])
    head: list[str] = ["", *(name for name, _ in columns)]
    if len(columns) > MOST_COLUMNS:  # several workloads: a line each
        head, *lines = (list(line) for line in zip(head, *lines, strict=True))
    others = [*_ranks(runs), _latencies(runs), _contexts(columns)]
    if side_by_side.has_names(report):
        others.insert(0, Table.of("Workloads side by side", _named_columns(), side_by_side.lines(report)))
    return Summary(
        Table.of("Runs side by side", head, lines), " ".join(_sentences(report)), [made for made in others if made.rows]
    )


def _named_columns() -> list[str | Column]:
    places = side_by_side.TEXT_COLUMNS
    return [Column(words, "text") if place in places else words for place, words in enumerate(side_by_side.HEAD)]


def _lines(runs: Sequence[Totals]) -> list[list[str]]:
    """A line for each number that at least one run has."""
    lines: list[list[str]] = []
    floors = any(run.floor_s is not None for run in runs)
    rows = (*ROWS, *LATER_ROWS, *FLOOR_ROWS, *LATER_FLOOR_ROWS)
    for label, key, form, factor in with_hundredths(rows) if floors else rows:
        values = [getattr(run, key, None) for run in runs]
        if any(value is not None for value in values):
            lines.append([label, *(number(value, form, factor) for value in values)])
    for label, key, words in (
        ("wall time of each run", "wall_s_of_each_run", lambda each: ", ".join(f"{wall:.3f}" for wall in each) + " s"),
        ("kernel busy", "kineto", _busy),
        ("cost of measuring", "overhead", lambda cost: signed(cost.share)),
    ):
        values = [getattr(run, key, None) for run in runs]
        if any(values):
            lines.append([label, *(words(value) if value else "-" for value in values)])
    return lines


def _busy(kineto: Kineto) -> str:
    return percent(kineto.busy, 2) + (", DIFFERS" if kineto.differs else "")


def _sentences(report: Report) -> Iterator[str]:
    if report.law_idle is not None:
        yield " ".join(by_the_law(report.law_idle))
    if any(run.engine == OWN for run in report.runs) and report.same_tokens:
        yield "All runs gave the same tokens."
    yield from (f"{line}." for line in without_floor(report))
    if side_by_side.has_names(report):
        yield from side_by_side.sentences(report)


def _ranks(runs: list[NamedRun]) -> Iterator[Table]:
    for name, run in runs:
        yield Table.of(f"{name}: {rank_words.TITLE}", rank_words.HEAD, rank_words.rows(run.ranks or ()))


def _latencies(runs: list[NamedRun]) -> Table:
    """A column for each run, as in the summary above it."""
    head = ["", *(f"{words}, {part}" for words, _ in LATENCY_ROWS for part in ("median", "p99"))]
    lines = [[name, *_latency_cells(run.latency)] for name, run in runs if run.latency]
    if 0 < len(lines) <= MOST_COLUMNS:
        head, *lines = (list(line) for line in zip(head, *lines, strict=True))
    return Table.of("Latency of requests, from their arrival", head, lines)


def _latency_cells(latency: Latency) -> Iterator[str]:
    for _, key in LATENCY_ROWS:
        yield milliseconds(getattr(latency, key).median)
        yield milliseconds(getattr(latency, key).p99)


def _contexts(runs: list[tuple[str, Totals]]) -> Table:
    rows = [
        [f"{name}, {words} context", f"{steps.context:.0f}", milliseconds(steps.ms),
         milliseconds(steps.floor_ms), number(steps.over_floor, "{:.3f}x")]
        for name, run in runs
        for words, steps in (("smallest", run.first_context), ("largest", run.last_context))
        if steps
    ]  # fmt: skip
    columns = ("", "context of a row", "device per step", "floor of a step", "step over floor")
    return Table.of("Decode steps against the memory bandwidth", columns, rows)


# ---- gaps, what if, points ----------------------------------------------------------------------------------------


def _gaps(runs: list[NamedRun]) -> list[list[Table]]:
    """For each run its idle time by cause, and the gaps that stand out."""
    gaps = [(name, run.gaps) for name, run in runs if run.gaps]
    walls = {name: run.explained_wall_s or 0.0 for name, run in runs}
    return [[*_causes(name, one, walls[name]), *_longest(name, one)] for name, one in gaps]


def _causes(name: str, gaps: IdleTime, wall_s: float) -> Iterator[Table]:
    """Idle time by cause, before all steps and before decode steps. The bars are shares of the whole run."""
    everywhere = gaps.all_by or gaps.by
    other_steps = any(gaps.by.get(cause) != long_s for cause, long_s in everywhere.items())
    rows: list[list[Cell]] = []
    for cause, long_s in sorted(everywhere.items(), key=lambda item: -item[1]):
        share = ratio(long_s, wall_s)
        rows.append([cause, milliseconds(1e3 * long_s), Meter(percent(share), share, "idle"), who(cause)])
        if other_steps:
            rows[-1].append(milliseconds(1e3 * gaps.by.get(cause, 0.0)))
    total_s = sum(everywhere.values())
    total = Meter(percent(ratio(total_s, wall_s)), ratio(total_s, wall_s), "none")
    rows.append(["all gaps", milliseconds(1e3 * total_s), total, ""])
    columns: list[str | Column] = [
        "Cause",
        "device idle",
        Column("share of the run", "text"),
        Column("who could mend it", "text"),
    ]
    if other_steps:
        rows[-1].append(milliseconds(1e3 * gaps.idle_s))
        columns.append("before decode steps")
    yield Table.of(f"{name}: why the device was idle", columns, rows)


def _longest(name: str, gaps: IdleTime) -> Iterator[Table]:
    rows: list[list[Cell]] = []
    for gap in gaps.longest:
        label = f"Show the gap before step {gap.step} of {name} in the timeline"
        button = ShowButton.around(label, gap.at_s, 1e-3 * gap.ms)
        rows.append([f"step\N{NO-BREAK SPACE}{gap.step}", seconds(gap.at_s), milliseconds(gap.ms), gap.cause, button])
    columns = ("before", "at", "idle for", Column("cause", "text"), Column("in the timeline", "live-only"))
    if rows:
        yield Table.of(f"{name}: gaps that stand out", columns, rows)


def _what_if(runs: list[NamedRun]) -> list[tuple[list[Table], str]]:
    """For each run its tables and a sentence. The what-if of a synchronous run shows both loops, so beside it that of
    the asynchronous run has nothing to add."""
    sync = [_workload(run) for _, run in runs if run.mode == "sync" and run.what_if]
    shown = [(name, run) for name, run in runs if run.what_if and (run.mode == "sync" or _workload(run) not in sync)]
    return [
        ([_what_if_table(name, run, side) for side in dict.fromkeys(one.where for one in run.what_if)],
         _as_it_is(run.prediction or Prediction()))
        for name, run in shown
    ]  # fmt: skip


def _workload(run: Run) -> tuple[Any, ...]:
    return run.engine, *workload_key(run)


def _as_it_is(now: Prediction) -> str:
    totals = [(mode, total) for mode, total in (("sync", now.sync_s), ("async", now.async_s)) if total is not None]
    if not totals:
        return ""
    return f"Simulated as it is: {', '.join(f'{mode} {seconds(total)}' for mode, total in totals)}. {now.text or ''}"


def _what_if_table(name: str, run: Run, side: str) -> Table:
    """The points of one side, host or device, in the report's order: what saves most comes first."""
    cases = [(mode, factor) for mode in ("sync", "async") for factor in (0.0, 0.5)]
    median = {point.name: point.median_ms for point in run.points if point.where == side}
    points: dict[str, dict[float | None, WhatIf]] = {}
    for one in run.what_if:
        if one.where == side:
            points.setdefault(one.point, {})[one.factor] = one
    rows = []
    for point, of_factor in points.items():
        cells: list[Cell] = [point, milliseconds(median.get(point))]
        for mode, factor in cases:
            one = of_factor.get(factor, WhatIf())
            total, saved = getattr(one, f"{mode}_s"), getattr(one, f"{mode}_saves")
            note = None if saved is None else signed(-saved, 1)
            cells.append(Meter(seconds(total), max(saved or 0.0, 0.0), "saves", note))
        rows.append(cells)
    heads = (Column(f"{mode}, if it took {'half' if factor else 'no time'}", "text") for mode, factor in cases)
    return Table.of(f"From the {name} run: points on the {side}", ("Latency point", "takes now", *heads), rows)


def _points(name: str, points: Sequence[PointTimes]) -> list[Table]:
    """A table for each side, host and device."""
    columns = ("Latency point", "median", "p99", "total", Column("share", "text"))
    tables = []
    for side in dict.fromkeys(point.where for point in points):
        rows = [
            (point.name, milliseconds(point.median_ms), milliseconds(point.p99_ms), seconds(point.total_s),
             Meter(percent(point.share), point.share or 0.0, side))
            for point in points
            if point.where == side
        ]  # fmt: skip
        tables.append(Table.of(f"{name}: points on the {side}", columns, rows))
    return tables


def _meanings(runs: list[NamedRun]) -> list[tuple[str, str]]:
    names = dict.fromkeys(point.name for _, run in runs for point in run.points)
    return [(name, MEANING[name]) for name in names if name in MEANING]


# ---- how it was measured ------------------------------------------------------------------------------------------


def _facts(report: Report, runs: list[NamedRun]) -> list[tuple[str, str]]:
    """(what, text) of the session and of each run; what is not known is left out."""
    bandwidth = report.copy_bandwidth_bytes_per_s
    facts: dict[str, str | None] = {
        "Command": report.command,
        "Date": report.date,
        "Machine": report.machine,
        "Device": report.device,
        "GPU": _card(report.gpu) if report.gpu else None,
        "Copy bandwidth": f"{bandwidth / 1e12:.3f} TB/s, read plus write" if bandwidth else None,
        "Matrix products": f"{rate / 1e12:.0f} TFLOP/s" if (rate := report.matmul_flops_per_s) else None,
        "Model": report.model,
        "Workload": ", ".join(_options(report.workload)),
        "Versions": ", ".join(f"{name} {version}" for name, version in report.versions.items() if version),
        "Preset": report.preset,
    }
    for name, run in runs:
        facts |= {f"{words}, {name}": text for words, text in _methods(run)}
    return [(what, text) for what, text in facts.items() if text]


def _card(gpu: Gpu) -> str:
    parts = (
        (gpu.name, "{}"),
        (gpu.memory_gib, "{} GiB"),
        (gpu.driver, "driver {}"),
        (gpu.compute_capability, "compute capability {}"),
    )
    return ", ".join(form.format(value) for value, form in parts if value)


def _options(workload: Conditions) -> Iterable[str]:
    for key, value in workload.to_json().items():
        if value is not None:
            yield f"{key.replace('_', ' ')} {f'{value:g}' if isinstance(value, float) else value}"


def _methods(run: Run) -> Iterator[tuple[str, str]]:
    """What a run says of how it was measured, as (what, text)."""
    if run.setting:
        yield "Setting", run.setting
    if kineto := run.kineto:
        busy, active = percent(kineto.busy, 2), percent(kineto.event_active, 2)
        words = "THEY DIFFER" if kineto.differs else "they agree"
        text = f"kernel busy {busy}, device active by events {active}: {words}. {kineto.note or ''}"
        yield "Two methods", text.strip()
    if run.overhead:
        yield "Cost of measuring", f"{cost_in_words(run.overhead)}: the same steps with and without it, in turns"
