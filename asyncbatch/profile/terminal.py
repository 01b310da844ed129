"""The profiling script's report in a terminal: with the tables of rich where it is installed and somebody is looking,
else the same as plain text."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, TextIO

from ..measure.text import table_lines
from . import rank_words
from .report import OWN, IdleTime, Report, Run, WhatIf, workload_key
from .text import number, table
from .verdict import who

SHOWN = 12  # rows of a section; the JSON and the page have all
BAR = 20  # characters of a whole bar
ROOMY, GAP = 80, 2  # columns of a terminal from which on tables have lines around their cells; between two cells


class Section(NamedTuple):
    """A table; its first column says what each row is about."""

    title: str
    header: Sequence[str]
    rows: list[list[str]]


def sections(report: Report) -> list[Section]:
    """The ranks of each run, where there are several; for each run its idle time by what the host was doing, and its
    longest gaps; then what each latency point would give back. Nothing of a preset with several workloads."""
    if len({workload_key(run) for run in report.runs}) > 1:
        return []
    made = [_ranks(run) for run in report.runs]
    made += [section for run in report.runs for section in (_idle(run), _gaps(run))]
    made += [_what_if(run) for run in report.runs if not _is_told_by_sync(run, report)]
    return [section for section in made if section.rows]


def _ranks(run: Run) -> Section:
    return Section(f"{_who(run)}: {rank_words.TITLE}", rank_words.HEAD, rank_words.rows(run.ranks or ()))


def _idle(run: Run) -> Section:
    """Causes of idle time. The bar is the share of the whole run, so that little idle time looks little."""
    gaps = run.gaps or IdleTime()
    everywhere = gaps.all_by or gaps.by
    rows, wall_s = [], run.explained_wall_s
    for name, seconds in list(everywhere.items())[:SHOWN]:
        before_decode, share = gaps.by.get(name, 0.0), seconds / wall_s if wall_s else 0.0
        cells = [f"{1e3 * each:.3f}" for each in (before_decode, seconds)]
        if not is_nothing(cells[-1]):
            rows.append([name, *cells, f"{share:.1%}", "#" * round(BAR * share), who(name)])
    title = f"{_explained(run)}: why the device was idle; before decode steps {1e3 * gaps.idle_s:.3f} ms"
    if gaps.all_idle_s is not None:
        title += f", before all steps {1e3 * gaps.all_idle_s:.3f} ms"
    header = ("cause", "ms, decode", "ms, all", "of the run", "", "who could mend it")
    return Section(title, header, rows)


def is_nothing(text: str) -> bool:
    """Whether a number in words is 0 in all digits that are shown."""
    return not any(digit in text for digit in "123456789")


def _gaps(run: Run) -> Section:
    longest = run.gaps.longest[:5] if run.gaps else ()
    rows = [[f"step {gap.step}", f"{gap.at_s:.3f}", f"{gap.ms:.3f}", gap.cause] for gap in longest]
    return Section(f"{_explained(run)}: gaps that stand out", ("before", "at s", "ms", "cause"), rows)


def _is_told_by_sync(run: Run, report: Report) -> bool:
    """Whether there is a synchronous run of the same engine: its what-if shows both loops."""
    return run.mode == "async" and any(other.mode == "sync" and other.engine == run.engine for other in report.runs)


def _what_if(run: Run) -> Section:
    median = {(point.name, point.where): point.median_ms for point in run.points}
    halves = {(one.point, one.where): one for one in run.what_if if one.factor == 0.5}
    rows = []
    for one in [one for one in run.what_if if one.factor == 0.0]:
        half = halves.get((one.point, one.where), WhatIf())
        shares = (one.sync_saves, half.sync_saves, one.async_saves, half.async_saves)
        cells = ["-" if share is None else f"{max(share, 0):.1%}" for share in shares]
        if all(map(is_nothing, cells)):
            continue
        rows.append([f"{one.point} ({one.where})", number(median.get((one.point, one.where)), "{:.3f}"), *cells])
    rows = rows[:SHOWN]
    header = ("latency point", "ms a step", "sync, gone", "sync, half", "async, gone", "async, half")
    return Section(
        f"What if, from the {_explained(run)} run: less time in all if it took no time, or half", header, rows
    )


def _who(run: Run) -> str:
    return str(run.mode) if run.engine == OWN else f"{run.engine} {run.mode}"


def _explained(run: Run) -> str:
    return _who(run) + (", rank 0" if run.ranks else "")


# ---- printing -----------------------------------------------------------------------------------------------------


def plain(section: Section) -> list[str]:
    """The section as lines of text. Columns of words are to the left, of numbers to the right."""
    align = "".join("<" if place in _words(section) else ">" for place in range(len(section.header)))
    return [section.title, *(f"  {line}" for line in table_lines([section.header, *section.rows], align))]


def _words(section: Section) -> set[int]:
    """The places of the columns that hold words, or a bar."""
    columns = list(zip(*section.rows, strict=True))
    return {0} | {place for place, cells in enumerate(columns) if not any(cell[:1].isdigit() for cell in cells)}


def show(report: Report, file: TextIO | None = None) -> None:
    """Print the report, on standard output unless `file` says where."""
    file = sys.stdout if file is None else file
    console = console_for(file)
    if console is not None:
        _show_rich(report, console)
        return
    blocks = [table(report).splitlines(), *map(plain, sections(report))]
    print("\n\n".join("\n".join(block) for block in blocks), file=file)


def _show_rich(report: Report, console: Any) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    for place, line in enumerate(table(report).splitlines()):
        # As Text: names of models and files never become markup. Sentences are broken between words; a table's line is
        # left to the terminal, which keeps its spaces.
        is_prose = "  " not in line
        console.print(Text(line, style="bold" if place < len(report.sentences) else ""), soft_wrap=not is_prose)
    for section in sections(report):
        console.print()
        least = _least_widths(section)
        look: dict[str, Any] = {"title_justify": "left", "title_style": "bold", "header_style": "dim"}
        if sum(least) + GAP * len(least) > console.width:  # then the terminal breaks its lines, and nothing is cut off
            for line in plain(section):
                console.print(Text(line), soft_wrap=True)
            continue
        if console.width < ROOMY:
            look |= {"box": SIMPLE_HEAD, "padding": (0, GAP - 1, 0, 0), "show_edge": False}
        made = Table(title=Text(section.title), **look)
        for column, name in enumerate(section.header):
            align: Any = "left" if column in _words(section) else "right"
            made.add_column(name, justify=align, no_wrap=column == 0, min_width=least[column])
        for row in section.rows:
            made.add_row(*map(Text, row))
        console.print(made)


def _least_widths(section: Section) -> list[int]:
    """How wide each column is at least: a number that went on in the next line would be another number. The first
    column is never broken."""
    columns = list(zip(section.header, *section.rows, strict=True))
    words = [[word for cell in column for word in cell.split()] for column in columns]
    return [max(map(len, columns[0])), *(max(map(len, each), default=0) for each in words[1:])]


def console_for(file: TextIO) -> Any:
    """A console of rich for a terminal; None where there is none or rich is not installed."""
    if not file.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(file=file, highlight=False)
