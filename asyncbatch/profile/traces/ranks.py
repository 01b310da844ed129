"""The traces of several processes of one job, each on its own GPU: a line for each, then the slowest.

Each trace is read by itself. Nothing of one is compared with a time of another: their clocks have nothing in common.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .events import TraceError
from .read import read_trace
from .report import SCHEMA, TraceReport
from .text import ms, plain, share

ENDINGS = (".json", ".json.gz")
ALIKE = 0.01  # periods that differ by less are the same: the ranks wait for each other


def trace_files(given: Sequence[Path]) -> list[Path]:
    """The files that were given; for a folder those in it that are named like traces. TraceError if it has none."""
    files: list[Path] = []
    for path in given:
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.name.endswith(ENDINGS) and file.is_file())
            if not found:
                raise TraceError(f"{path} is a folder without a file named {' or '.join('*' + end for end in ENDINGS)}")
            files += found
        else:
            files.append(path)
    return list(dict.fromkeys(files))


@dataclass(eq=False)
class Ranks:
    """The reports on the traces of several ranks, by their numbers where the traces have them, else by file.

    `failed`: what is wrong with each file that is no trace of a GPU."""

    reports: list[TraceReport]
    failed: dict[Path, str] = field(default_factory=dict)

    @classmethod
    def read(cls, paths: Sequence[Path], progress: bool = False) -> Ranks:
        """Read one after the other. TraceError if none of them can be read."""
        reports, failed = [], {}
        for path in paths:
            try:
                reports.append(read_trace(path, progress))
            except TraceError as error:
                failed[path] = str(error)
        if not reports:
            raise TraceError("; ".join(failed.values()))
        return cls(sorted(reports, key=lambda report: (report.rank is None, report.rank or 0, report.label)), failed)

    @property
    def slowest(self) -> tuple[TraceReport, str] | None:
        """The slowest rank and why it is; None where fewer than two have several steps, all of whose events are there.

        It has the longest steps. Where the steps of all take the same time, since they wait for each other in
        collectives, it is the one that spends least time there: the others wait for it."""
        told = [(report, period) for report in self.reports if (period := period_s(report)) is not None]
        if len(told) < 2:
            return None
        periods = [period for _, period in told]
        longest, shortest = max(periods), min(periods)
        in_collectives = [report.collectives_s for report, _ in told]
        if longest - shortest > ALIKE * longest:
            report = told[periods.index(longest)][0]
            return report, f"its steps take {ms(1e3 * longest)}, those of the fastest {ms(1e3 * shortest)}"
        if max(in_collectives) == 0:
            return None
        report, period = min(told, key=lambda one: one[0].collectives_s / one[0].window_s)
        return report, (
            f"the steps of all take the same time ({ms(1e3 * period)}), and it spends least of it in collectives, "
            "where the others wait for it"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: `ranks`, a report for each, and `slowest`, which of them, or null."""
        slowest = self.slowest
        return {
            "schema": SCHEMA,
            "ranks": [report.as_dict() for report in self.reports],
            "slowest": None if slowest is None else self.reports.index(slowest[0]),
            "failed": list(self.failed.values()),
        }

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        rows = [("rank", "steps", "a step", "idle", "busy", "collectives", "trace"), *map(_row, self.reports)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            yield "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        yield ""
        slowest = self.slowest
        if slowest is None:
            yield "No rank is slower than the others, as far as these traces tell."
        else:
            yield f"The slowest is {name_of(slowest[0])}: {slowest[1]}."
            yield ""
            yield str(slowest[0])


def name_of(report: TraceReport) -> str:
    return plain(report.label) if report.rank is None else f"rank {report.rank}"


def period_s(report: TraceReport) -> float | None:
    """Seconds from the end of a step to the end of the next (median); None where idle time is not told."""
    return None if report.step_active is None else float(np.median(np.diff(report.steps[:, 1])))


def _row(report: TraceReport) -> tuple[str, ...]:
    period, active, complete = period_s(report), report.step_active, report.coverage.complete
    idle = share(None if active is None else 1 - active) if complete else "events missing"
    return (
        "-" if report.rank is None else str(report.rank),
        str(len(report.steps)) if complete else "-",
        "-" if period is None else ms(1e3 * period),
        idle,
        share(report.kernel_busy_in_steps),
        share(report.collectives_s / report.window_s if report.window_s and complete else None),
        plain(report.label, 60),
    )
