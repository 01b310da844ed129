"""The report as text: a column for each run, or a line for each where there are several workloads, and sentences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..measure.text import in_seconds, table_line, table_lines
from . import rank_words, side_by_side
from .options import FEWEST, MOST
from .report import OWN, Latency, Overhead, Report, Run, Totals, workload_key, workload_words


class _Seconds(str):
    """A form whose seconds have the digits that count."""

    def format(self, *values: Any, **_: Any) -> str:
        return in_seconds(*values)


SECONDS = _Seconds("{:.3f} s")
# What is shown of a run: its words, the field, how it is written, and by what it is multiplied first.
ROWS = (
    ("wall time", "wall_s", SECONDS, 1),
    ("tokens", "tokens", "{}", 1),
    ("tokens per second", "tokens_per_s", "{:.1f}", 1),
    ("device active", "device_active", "{:.1f} %", 100),
    ("device idle", "idle", "{:.1f} %", 100),
    ("host work per step", "host_ms_per_step", "{:.3f} ms", 1),
    ("device per step", "device_ms_per_step", "{:.3f} ms", 1),
    ("steps", "steps", "{}", 1),
    ("wasted tokens", "wasted_tokens", "{}", 1),
)
LATER_ROWS = (  # shown where a run has it: older reports do not
    ("idle, all steps", "idle_all_steps", "{:.1f} %", 100),
    ("measured steps", "measured_steps", "{}", 1),
    ("longest gap", "longest_gap_ms", "{:.3f} ms", 1),
)
FLOOR_ROWS = (
    ("floor of the run", "floor_s", SECONDS, 1),
    ("time over floor", "time_over_floor", "{:.3f}x", 1),
)
LATER_FLOOR_ROWS = (
    ("floor of requests", "request_floor_s", SECONDS, 1),
    ("time over that", "time_over_request_floor", "{:.3f}x", 1),
)
LATENCY_ROWS = (("first token", "first_token_ms"), ("per token", "per_token_ms"), ("end to end", "end_to_end_ms"))
CONTEXT_ROWS = (
    ("device per step", "ms", "{:.3f} ms"),
    ("floor of a step", "floor_ms", "{:.3f} ms"),
    ("step over floor", "over_floor", "{:.3f}x"),
)
DIFFERENT_TOKENS = "The tokens differ: that is a fault, and the comparison is void."


def table(report: Report) -> str:
    """The whole report as text."""
    lines = report.sentences
    lines += [*([""] if lines else []), f"model: {report.model}", f"device: {report.device}"]
    if report.copy_bandwidth_bytes_per_s:
        lines.append(f"copy bandwidth, read plus write: {report.copy_bandwidth_bytes_per_s / 1e12:.3f} TB/s")
    if report.matmul_flops_per_s:
        lines.append(f"matrix products: {report.matmul_flops_per_s / 1e12:.0f} TFLOP/s")
    lines.append("")
    if side_by_side.has_names(report):
        lines += lines_of_names(report)
    elif len(report.comparisons) > 1:
        lines += lines_of_workloads(report)
    elif report.runs:
        lines += columns(report)
    lines += notes(report)
    lines.append("")
    if len(report.comparisons) == 1 and report.law_idle is not None:
        lines += by_the_law(report.law_idle)
    elif len(report.comparisons) > 1 and report.same_tokens is False:
        lines.append(DIFFERENT_TOKENS)
    return "\n".join(lines)


# ---- numbers ------------------------------------------------------------------------------------------------------


def with_hundredths(rows: Iterable[tuple[str, str, str, int]]) -> list[tuple[str, str, str, int]]:
    """The rows with two digits in each share: on a GPU the hundredths count, as 99.97 is not 99.99."""
    return [
        (label, key, form.replace(".1f} %", ".2f} %") if ".1f} %" in form else form, factor)
        for label, key, form, factor in rows
    ]


def number(value: Any, form: str, factor: float = 1) -> str:
    return "-" if value is None else form.format(value * factor)


def columns(report: Report) -> list[str]:
    """One column for each run, and for each recorded one."""
    runs: list[Totals] = [*report.runs, *report.recorded]
    engines = ["emulated" if report.emulated else str(run.engine) for run in report.runs]
    engines += ["recorded"] * len(report.recorded)
    rows: list[list[str]] = [["", *engines]] if len(set(engines)) > 1 or report.emulated else []
    rows.append(["", *(str(run.mode) for run in runs)])
    floors = any(run.floor_s is not None for run in runs)
    for label, key, form, factor in with_hundredths((*ROWS, *FLOOR_ROWS)) if floors else ROWS:
        rows.append([label, *(number(getattr(run, key), form, factor) for run in runs)])
        if key == "idle":
            rows += _later(runs, with_hundredths(LATER_ROWS) if floors else LATER_ROWS)
    rows += _later(runs, LATER_FLOOR_ROWS)
    if report.workload.over_time:
        rows += _latencies(runs)
    if floors:
        rows += _contexts(runs)
    if report.async_speedup is not None:
        rows.append(["async / sync speed", "", f"{report.async_speedup:.3f}x"])
    if own := sum(run.engine == OWN for run in report.runs):
        rows.append(["same tokens", *[""] * (own - 1), "yes" if report.same_tokens else "NO"])
    return [table_line(row, [20] + [14] * (len(row) - 1)) for row in rows]


def _later(runs: Sequence[Totals], later: Iterable[tuple[str, str, str, int]]) -> Iterable[list[str]]:
    for label, key, form, factor in later:
        values = [getattr(run, key, None) for run in runs]
        if any(value is not None for value in values):
            yield [label, *(number(value, form, factor) for value in values)]


def _latencies(runs: Sequence[Totals]) -> Iterable[list[str]]:
    for label, key in LATENCY_ROWS:
        times = [getattr(getattr(run, "latency", None) or Latency(), key) for run in runs]
        for part in ("median", "p99"):
            yield [f"{label}, {part}", *(number(getattr(one, part), "{:.1f} ms") for one in times)]


def _contexts(runs: Sequence[Totals]) -> Iterable[list[str]]:
    for key, name in (("first_context", "smallest"), ("last_context", "largest")):
        steps = [getattr(run, key) for run in runs]
        yield [f"{name} context/row", *(number(one and one.context, "{:.0f}") for one in steps)]
        for label, part, form in CONTEXT_ROWS:
            yield [f"  {label}", *(number(one and getattr(one, part), form) for one in steps)]


def lines_of_workloads(report: Report) -> list[str]:
    """One line for each run, of several workloads."""
    widths = (18, 7, 14, 7, 11, 10, 9, 11, 9, 12, 12)
    head = ("model", "batch", "engine", "mode", "tokens/s", "active %", "host ms", "device ms", "gap ms", "over floor",
            "async/sync")  # fmt: skip
    lines = [table_line(head, widths)]
    of_workload = {workload_key(one): one.async_speedup for one in report.comparisons}
    for run in report.runs:
        is_own_async = (run.engine, run.mode) == (OWN, "async")
        cells = [run.model, run.batch_size, run.engine, run.mode, number(run.tokens_per_s, "{:.1f}")]
        cells += [number(run.device_active, "{:.2f}", 100)]
        cells += [number(value, "{:.3f}") for value in (run.host_ms_per_step, run.device_ms_per_step)]
        cells += [number(run.longest_gap_ms, "{:.3f}"), number(run.time_over_floor, "{:.3f}x")]
        cells += [number(of_workload.get(workload_key(run)) if is_own_async else None, "{:.3f}x")]
        lines.append(table_line(cells, widths))
    return lines


def lines_of_names(report: Report) -> list[str]:
    """One line for each run, of workloads that have names, and sentences on them."""
    align = "".join("<" if place in side_by_side.TEXT_COLUMNS else ">" for place in range(len(side_by_side.HEAD)))
    lines = table_lines([side_by_side.HEAD, *side_by_side.lines(report)], align)
    lines += ["", *side_by_side.sentences(report)]
    speedups_of = {workload_words(one): one.async_speedup for one in report.comparisons if one.async_speedup}
    if speedups_of:
        each = "; ".join(f"{words} {speedup:.3f}x" for words, speedup in speedups_of.items())
        lines.append(f"async / sync speed of {OWN}: {each}")
    both_loops = [one for one in report.comparisons if one.pairs or one.async_speedup]
    if report.same_tokens and len([run for run in report.runs if run.engine == OWN]) > len(both_loops) > 0:
        lines.append(f"{OWN}: all runs of a workload gave the same tokens, sync and async.")
    return lines


# ---- sentences ----------------------------------------------------------------------------------------------------


def cost_in_words(overhead: Overhead) -> str:
    """What measuring costs; "-" for a number that is not there."""

    def percent(share: float | None) -> str:
        return "-" if share is None else f"{100 * share:+.2f} %"

    within = ""
    if overhead.interval:
        low, high = overhead.interval
        within = f" (95 % sure: {percent(low)} to {percent(high)})"
    ms = "-" if overhead.ms_per_step is None else f"{overhead.ms_per_step:+.4f}"
    return f"{percent(overhead.share)} of a step{within}, {ms} ms"


def notes(report: Report) -> list[str]:
    """What must be said beside the numbers: settings of other engines, what failed, what is recorded."""
    several = len(report.comparisons) > 1
    settings = (f"{_who(run)}: {run.setting}" for run in report.runs if run.setting is not None)
    lines = list(dict.fromkeys(settings))
    for run in report.runs:
        lines += _notes_of(run, _who(run, several), report)
    lines += [f"{_who(one, several)} was not measured: {one.error}" for one in report.failed]
    lines += without_floor(report)
    differing = (engine for engine, same in report.peers_same_tokens.items() if not same)
    lines += [f"{engine}: sync and async gave different tokens" for engine in differing]
    if report.workload.budget_s and report.runs:
        lines.append(_within_budget(report.workload.repeats, report.workload.budget_s, report.runs))
    if report.workload.over_time:
        arrivals = report.workload.arrivals
        lines.append(f"requests arrive over time ({arrivals}): that bounds wall time and tokens per second, so the")
        lines.append("latencies, in milliseconds from a request's arrival, are what to compare.")
    if report.emulated:
        parts = dict.fromkeys(str(run.setting) for run in report.recorded)
        counted = ", ".join(parts) or "no run of this batch size"
        lines.append(f"emulated: the device's times come from the recording {report.emulated}, the host's work is")
        lines.append(f"this machine's. recorded: what that session itself measured ({counted}).")
    return ["", *lines] if lines else []


def without_floor(report: Report) -> Iterable[str]:
    """Of each model whose runs are not shown beside a floor, why; once."""
    without = [run for run in report.runs if run.floor_s is None and run.model in report.models]
    longest = {one.model: max(run.longest for run in without if run.model == one.model) for one in without}
    why = {model: report.models[str(model)].no_floor(tokens) for model, tokens in longest.items()}
    return [f"{model}: no floor is told, since {reason}" for model, reason in why.items() if reason]


def _within_budget(repeats: int | None, budget_s: int, runs: Sequence[Run]) -> str:
    first_s = sum(run.wall_s_of_each_run[0] for run in runs if run.wall_s_of_each_run)
    return (
        f"{repeats} runs of each mode: the first of each took {first_s:.1f} s together, and --budget-s is {budget_s} "
        f"({FEWEST} are made in any case, {MOST} at most)"
    )


def _notes_of(run: Run, who: str, report: Report) -> Iterable[str]:
    if run.ranks:
        yield f"{who}: {len(run.ranks)} ranks; idle and times of a step are means over them, tokens and steps of all"
        if note := rank_words.clock_note(run.ranks):
            yield note
    if run.interrupted:
        ended = "early" if report.workload.tp else "by Ctrl-C"
        yield f"{who} was ended {ended}: the numbers are about what ran until then"
    if run.overhead:
        yield f"{who}: measuring costs {cost_in_words(run.overhead)}"
    if run.kineto:
        busy, active = (number(share, "{:.2%}") for share in (run.kineto.busy, run.kineto.event_active))
        yield f"{who}, under torch.profiler: kernel busy {busy}, event-timed active {active} ({run.kineto.note})"


def _who(one: Any, several: bool = False) -> str:
    where = f"{workload_words(one)}: " if several else ""
    return f"{where}{one.engine} {one.mode}"


def by_the_law(law: float) -> Iterable[str]:
    """What the law says of the synchronous loop's host work, beside which the measured idle time has other parts."""
    yield f"By the law idle = host / (host + device) the synchronous device is idle for {law:.1%} of a step;"
    if law <= 0.5:
        yield "waking up and copies add to it, host work after the launch takes from it."
    else:
        yield "the host works longer than the device, so the device still waits in the asynchronous loop."
    if law < 0.02:
        yield "So little is idle because a step takes long beside the host's work. To see more, try"
        yield "--host-work-ms 30 for a busier host, or --step-ms 10 for a faster device."
