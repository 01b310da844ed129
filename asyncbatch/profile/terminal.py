"""The profiling script's report in a terminal: tables of rich where it is installed and somebody is looking, else the
same as plain text."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, TextIO

from .report import OWN, table

SHOWN = 12  # rows of a section; the JSON and the page have all
BAR = 20  # characters of a whole bar


class Section(NamedTuple):
    """A table: the first column is text, all others are numbers or short words."""

    title: str
    header: Sequence[str]
    rows: list[list[str]]


def sections(result: dict[str, Any]) -> list[Section]:
    """For each run its idle time by what the host was doing, its longest gaps, and what each latency point would give
    back; of a preset with several workloads none of these."""
    found = []
    several = len({(row["model"], row["batch_size"]) for row in result["runs"]}) > 1
    for row in [] if several else result["runs"]:
        who = row["mode"] if row["engine"] == OWN else f"{row['engine']} {row['mode']}"
        idle_s = row["gaps"]["idle_s"]
        if idle_s > 0:
            rows = []
            for name, seconds in list(row["gaps"]["by"].items())[:SHOWN]:
                share = seconds / idle_s
                rows.append([name, f"{1e3 * seconds:.3f}", f"{share:.1%}", "#" * round(BAR * share)])
            title = f"{who}: idle for {1e3 * idle_s:.3f} ms before decode steps, while the host was at"
            found.append(Section(title, ("latency point", "ms", "share", ""), rows))
        rows = [
            [f"step {gap['step']}", f"{gap['at_s']:.3f}", f"{gap['ms']:.3f}", gap["cause"]]
            for gap in row["gaps"]["longest"][:5]
        ]
        if rows:
            found.append(Section(f"{who}: gaps that stand out", ("before", "at s", "ms", "cause"), rows))
    for row in [] if several else result["runs"]:
        if row["mode"] == "async" and any(
            other["mode"] == "sync" and other["engine"] == row["engine"] for other in result["runs"]
        ):
            continue  # its what-if is that of the synchronous run, which shows both loops
        who = row["mode"] if row["engine"] == OWN else f"{row['engine']} {row['mode']}"
        median = {(point["name"], point["where"]): point["median_ms"] for point in row["points"]}
        halves = {(one["point"], one["where"]): one for one in row["what_if"] if one["factor"] == 0.5}
        rows = []
        for one in [one for one in row["what_if"] if one["factor"] == 0.0][:SHOWN]:
            ms, half = median.get((one["point"], one["where"])), halves[one["point"], one["where"]]
            cells = [one["sync_saves"], half["sync_saves"], one["async_saves"], half["async_saves"]]
            text = "-" if ms is None else f"{ms:.3f}"
            rows.append([f"{one['point']} ({one['where']})", text, *(f"{max(cell, 0):.1%}" for cell in cells)])
        if rows:
            header = ("latency point", "ms a step", "sync, gone", "sync, half", "async, gone", "async, half")
            found.append(
                Section(f"What if, from the {who} run: less time in all if it took no time, or half", header, rows)
            )
    return found


def plain(section: Section) -> list[str]:
    cells = [list(section.header), *section.rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(section.header))]
    lines = [section.title]
    for row in cells:
        last = len(row) - 1
        aligned = [
            cell.ljust(width) if i == 0 or (i == last and not cell.endswith("%")) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  " + "  ".join(aligned).rstrip())
    return lines


def show(result: dict[str, Any], file: TextIO | None = None) -> None:
    """Print the report."""
    file = sys.stdout if file is None else file
    console = _console(file)
    if console is None:
        blocks = [table(result).splitlines(), *map(plain, sections(result))]
        print("\n\n".join("\n".join(block) for block in blocks), file=file)
        return
    from rich.table import Table
    from rich.text import Text

    lines = table(result).splitlines()
    for number, line in enumerate(lines):
        # As Text: names of models and files never become markup.
        console.print(Text(line, style="bold" if number == 0 and result["first"] else ""), soft_wrap=True)
    for section in sections(result):
        made = Table(title=Text(section.title), title_justify="left", title_style="bold", header_style="dim")
        for i, name in enumerate(section.header):
            made.add_column(name, justify="left" if i == 0 else "right")
        for row in section.rows:
            made.add_row(*map(Text, row))
        console.print()
        console.print(made)


def _console(file: TextIO) -> Any:
    if not file.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(file=file, highlight=False)
