"""Workloads that have names, side by side: a line for each of their runs, which says where another engine is faster.

The table in the terminal, the one on the page and the one in docs/performance.md are made from `HEAD` and `lines`. The
floor is that of the requests, the same for every engine, and not the one that counts an engine's own steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .report import OWN, Latency, Report, Run, workload_key, workload_words

HEAD = ("workload", "engine", "mode", "wall s", "tokens/s", "idle %", "longest gap ms", "first token ms", "its p99",
        "floor s", "over floor", "faster than asyncbatch in")  # fmt: skip
TEXT_COLUMNS = (0, 1, 2, len(HEAD) - 1)  # words, and no numbers
# In what a run can be faster than another one.
TIMES = (("wall time", ("wall_s",)), ("first token", ("latency", "first_token_ms", "median")),
         ("first token's p99", ("latency", "first_token_ms", "p99")))  # fmt: skip


def has_names(report: Report) -> bool:
    """Whether the workloads of the report have names."""
    return any(run.workload for run in report.runs)


def lines(report: Report) -> list[list[str]]:
    """A line for each run, in the columns of `HEAD`. What is not known is "-"."""
    return [_line(run, ", ".join(_in_words(run, report.runs))) for run in report.runs]


def _line(run: Run, faster_in: str) -> list[str]:
    first = (run.latency or Latency()).first_token_ms
    cells = ((run.wall_s, "{:.2f}", 1), (run.tokens_per_s, "{:.0f}", 1), (run.idle, "{:.2f}", 100),
             (run.longest_gap_ms, "{:.2f}", 1), (first.median, "{:.0f}", 1), (first.p99, "{:.0f}", 1),
             (run.request_floor_s, "{:.2f}", 1), (run.time_over_request_floor, "{:.2f}x", 1))  # fmt: skip
    numbers = ("-" if value is None else form.format(factor * value) for value, form, factor in cells)
    return [workload_words(run), str(run.engine), str(run.mode), *numbers, faster_in]


def sentences(report: Report) -> list[str]:
    """For each run of another engine that is faster than this package at anything, a sentence that says so; or one
    that says that none is."""
    found = []
    for run in report.runs:
        beside = counterpart(run, report.runs)
        words = _in_words(run, report.runs)
        if beside is not None and words:
            who = f"{run.engine} {run.mode} is faster than {OWN} {beside.mode}"
            found.append(f"{workload_words(run)}: {who} in {', '.join(words)}.")
    compared = any(counterpart(run, report.runs) for run in report.runs)
    nowhere = f"Nowhere is another engine faster than {OWN}: neither in wall time nor in the time of the first token."
    return found or ([nowhere] if compared else [])


def _in_words(run: Run, runs: Iterable[Run]) -> list[str]:
    return [f"{what} ({times:.3f}x)" for what, times in faster(run, runs)]


def counterpart(run: Run, runs: Iterable[Run]) -> Run | None:
    """This package's run beside which another engine's is judged: on the same workload, in the same mode if there is
    one. None for this package itself, where there is no such run, and where one of the two is incomplete."""
    own = {one.mode: one for one in runs
           if one.engine == OWN and workload_key(one) == workload_key(run) and not one.interrupted}  # fmt: skip
    if run.engine == OWN or run.interrupted or not own:
        return None
    return own.get(run.mode) or next(iter(own.values()))


def faster(run: Run, runs: Iterable[Run]) -> list[tuple[str, float]]:
    """In what a run of another engine is faster than this package's beside it, and how many times."""
    beside = counterpart(run, runs)
    if beside is None:
        return []
    pairs = [(what, _value(run, names), _value(beside, names)) for what, names in TIMES]
    return [(what, own / other) for what, other, own in pairs if other and own and other < own]


def _value(run: Run, names: Sequence[str]) -> Any:
    value: Any = run
    for name in names:
        value = getattr(value, name, None)
    return value
