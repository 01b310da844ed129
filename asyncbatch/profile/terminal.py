"""The profiling script's report in a terminal: with the tables of rich where it is installed and somebody is looking,
else the same as plain text."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, TextIO

from ..measure.text import table_lines
from .report import OWN, Report, Run, WhatIf, workload_key
from .text import number, table

SHOWN = 12  # rows of a section; the JSON and the page have all
BAR = 20  # characters of a whole bar


class Section(NamedTuple):
    """A table: the first column is text, all others are numbers or short words."""

    title: str
    header: Sequence[str]
    rows: list[list[str]]


def sections(report: Report) -> list[Section]:
    """For each run its idle time by what the host was doing, and its longest gaps; then what each latency point would
    give back. Nothing of a preset with several workloads."""
    if len({workload_key(run) for run in report.runs}) > 1:
        return []
    made = [section for run in report.runs for section in (_idle(run), _gaps(run))]
    made += [_what_if(run) for run in report.runs if not _is_told_by_sync(run, report)]
    return [section for section in made if section.rows]


def _idle(run: Run) -> Section:
    rows, idle_s = [], run.gaps.idle_s if run.gaps else 0.0
    if run.gaps and idle_s > 0:
        for name, seconds in list(run.gaps.by.items())[:SHOWN]:
            share = seconds / idle_s
            rows.append([name, f"{1e3 * seconds:.3f}", f"{share:.1%}", "#" * round(BAR * share)])
    title = f"{_who(run)}: idle for {1e3 * idle_s:.3f} ms before decode steps, while the host was at"
    return Section(title, ("latency point", "ms", "share", ""), rows)


def _gaps(run: Run) -> Section:
    longest = run.gaps.longest[:5] if run.gaps else ()
    rows = [[f"step {gap.step}", f"{gap.at_s:.3f}", f"{gap.ms:.3f}", gap.cause] for gap in longest]
    return Section(f"{_who(run)}: gaps that stand out", ("before", "at s", "ms", "cause"), rows)


def _is_told_by_sync(run: Run, report: Report) -> bool:
    """Whether there is a synchronous run of the same engine: its what-if shows both loops."""
    return run.mode == "async" and any(other.mode == "sync" and other.engine == run.engine for other in report.runs)


def _what_if(run: Run) -> Section:
    median = {(point.name, point.where): point.median_ms for point in run.points}
    halves = {(one.point, one.where): one for one in run.what_if if one.factor == 0.5}
    rows = []
    for one in [one for one in run.what_if if one.factor == 0.0][:SHOWN]:
        half = halves.get((one.point, one.where), WhatIf())
        shares = (one.sync_saves, half.sync_saves, one.async_saves, half.async_saves)
        cells = ("-" if share is None else f"{max(share, 0):.1%}" for share in shares)
        rows.append([f"{one.point} ({one.where})", number(median.get((one.point, one.where)), "{:.3f}"), *cells])
    header = ("latency point", "ms a step", "sync, gone", "sync, half", "async, gone", "async, half")
    return Section(f"What if, from the {_who(run)} run: less time in all if it took no time, or half", header, rows)


def _who(run: Run) -> str:
    return str(run.mode) if run.engine == OWN else f"{run.engine} {run.mode}"


# ---- printing -----------------------------------------------------------------------------------------------------


def plain(section: Section) -> list[str]:
    """The section as lines of text. The last column holds shares, to the right, or words, to the left."""
    align = "<" + ">" * (len(section.header) - 2) + "%"
    return [section.title, *(f"  {line}" for line in table_lines([section.header, *section.rows], align))]


def show(report: Report, file: TextIO | None = None) -> None:
    """Print the report, on standard output unless `file` says where."""
    file = sys.stdout if file is None else file
    console = _console(file)
    if console is not None:
        _show_rich(report, console)
        return
    blocks = [table(report).splitlines(), *map(plain, sections(report))]
    print("\n\n".join("\n".join(block) for block in blocks), file=file)


def _show_rich(report: Report, console: Any) -> None:
    from rich.table import Table
    from rich.text import Text

    for place, line in enumerate(table(report).splitlines()):
        # As Text: names of models and files never become markup.
        console.print(Text(line, style="bold" if place == 0 and report.first else ""), soft_wrap=True)
    for section in sections(report):
        made = Table(title=Text(section.title), title_justify="left", title_style="bold", header_style="dim")
        for column, name in enumerate(section.header):
            made.add_column(name, justify="left" if column == 0 else "right")
        for row in section.rows:
            made.add_row(*map(Text, row))
        console.print()
        console.print(made)


def _console(file: TextIO) -> Any:
    """A console of rich for a terminal; None where there is none or rich is not installed."""
    if not file.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(file=file, highlight=False)
