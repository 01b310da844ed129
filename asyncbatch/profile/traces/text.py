"""The report on a trace as text. The first screen has four answers, in this order: how idle the device was, why, what
overlapping would bring, and whether to believe it. Then comes the rest."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from ...measure.points import NOTHING
from .overlap import PARTS

TraceReport = Any  # its module imports this one, to be printed
FEW_STEPS = 20
WIDTH, LABEL = 110, 16
WHAT_TO_DO = (
    "Record fewer steps; let the profiler warm up before them (torch.profiler.schedule); synchronize the device before "
    "it stops; or give its buffers more room: a file with the line ACTIVITIES_MAX_GPU_BUFFER_SIZE_MB=1024, whose path "
    "is in KINETO_CONFIG. docs/traces.md says more."
)


def plain(text: str, longest: int = 80) -> str:
    """A name in the file as text for a terminal: without control characters, and not too long."""
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return text if len(text) <= longest else text[: longest - 3] + "..."


def ms(value: float) -> str:
    return f"{value:.3f} ms" if abs(value) < 1 else f"{value:.2f} ms"


def share(value: float | None) -> str:
    return "not measured" if value is None else f"{100 * value:.2f} %"


# ---- the first screen -----------------------------------------------------------------------------------------------


def answers(report: TraceReport) -> dict[str, str]:
    """The four answers, by their questions."""
    return {
        "How idle": how_idle(report),
        "Why": " ".join(_why(report)),
        "Overlapping": " ".join(_overlapping(report)),
        "To be believed": " ".join(_believe(report)),
    }


def how_idle(report: TraceReport) -> str:
    steps = len(report.steps)
    if not report.coverage.complete:
        problems = "; ".join(report.coverage.problems())
        return f"Not told: {problems}. The device may have been at work where nothing is left."
    if report.step_active is None:
        return "Not measured: for that, several steps must be found, and in this trace it is one. Record 20 or more."
    active, busy = report.step_active, report.kernel_busy_in_steps
    return (
        f"Between its steps the device was idle for {share(1 - active)} of the time ({steps - 1} of {steps} steps "
        f"counted: from the end of the first). Some kernel or copy ran in {share(busy)} of it."
    )


def _why(report: TraceReport) -> Iterator[str]:
    if not report.coverage.complete:
        yield "Not told, for the same reason."
    elif report.step_active is None:
        yield "Not measured."
    else:
        yield from _why_between(report)
        between, inside = report.idle_s["between steps"], report.idle_s["inside steps"]
        if inside > between:
            causes = {cause: seconds / inside for cause, seconds in report.idle_by_cause(True).items()}
            yield f"More time is lost inside steps, where nothing ran for {ms(1e3 * inside)}: {_causes(causes)}."


def _why_between(report: TraceReport) -> Iterator[str]:
    overlap = report.overlap
    if overlap is None:
        yield from _why_without_launches(report)
    else:
        when = "after" if overlap.launch_after_end_ms >= 0 else "before"
        sentence = (
            f"The launch of step N+1 comes {ms(abs(overlap.launch_after_end_ms))} {when} the end of step N (median of "
            f"{overlap.pairs})"
        )
        if overlap.overlaps:
            yield f"{sentence}: the device has its next step before it is done."
        else:
            yield f"{sentence}, because of {_causes(overlap.causes)}."
        if overlap.gap_ms > 0 or not overlap.overlaps:
            copy, host, begin = (ms(overlap.parts_ms[part]) for part in PARTS)
            yield (
                f"A gap is {ms(sum(overlap.parts_ms.values()))} on average: {copy} until the results are copied, "
                f"{host} of the host until it launches, {begin} from the launch to the first kernel."
            )


def _causes(causes: dict[str, float]) -> str:
    told = [f"{plain(cause, 60)} ({100 * part:.0f} %)" for cause, part in list(causes.items())[:3] if part >= 0.05]
    text = " and ".join(told) if told else "nothing that was recorded"
    return text + ("; record the CPU too to see what that is" if causes.get(NOTHING, 0) >= 0.5 else "")


def _why_without_launches(report: TraceReport) -> Iterator[str]:
    if report.coverage.early:
        yield "Not told: by its clock the device begins before the host launches: no launch can be put in a gap."
        return
    yield "The trace does not say when steps were launched."
    idle_s = report.idle_s["between steps"]
    if idle_s:
        causes = {cause: seconds / idle_s for cause, seconds in report.idle_by_cause(False).items()}
        yield f"In the gaps the host was in {_causes(causes)}."


def _overlapping(report: TraceReport) -> Iterator[str]:
    overlap = report.overlap
    if overlap is None:
        yield "Not told: for that, several steps, their launches and everything that ran on the device must be known."
        return
    ahead = f"{overlap.ahead} of {overlap.pairs} steps were launched before the one before them had ended"
    if overlap.overlaps:
        left = 1 - (report.step_active or 0.0)
        yield f"This engine overlaps: {ahead}. Without any gap it would be {1 / (1 - left):.3f}x as fast."
        return
    yield f"This engine does not overlap: {ahead}."
    if overlap.speedup is None or overlap.host_ms is None:
        yield "What overlapping would bring is not told: the launching thread has no wait for the device on record."
        return
    longer = "device" if overlap.device_ms >= overlap.host_ms else "host"
    yield (
        f"Overlapped, its steps could be {overlap.speedup:.2f}x as fast, at most. A step takes "
        f"{ms(overlap.period_ms)}: {ms(overlap.device_ms)} on the device, and {ms(overlap.host_ms)} of work on the "
        f"host; overlapped, it takes the longer of the two, the {longer}'s."
    )


def _believe(report: TraceReport) -> Iterator[str]:
    coverage = report.coverage
    if not coverage.complete:
        yield f"No: {'; '.join(coverage.problems())}. {WHAT_TO_DO}"
    elif not coverage.known:
        yield "Unknown: the trace has no calls of the runtime, so that missing events of the device cannot be seen."
    else:
        *others, last = (f"{count} {kind}" for kind, count in coverage.calls.items())
        counts = f"{', '.join(others)} and {last}" if others else last
        yield f"All that was launched has events of the device: {counts}."
    if coverage.early:
        yield (
            f"The clocks of host and device disagree: {coverage.early} events begin before they were launched, by up "
            f"to {ms(coverage.early_ms)}. What the host did in a gap may be wrong by as much."
        )
    elif coverage.known and coverage.complete:
        yield "The clocks agree: nothing begins before its launch."
    if coverage.complete and 1 < len(report.steps) < FEW_STEPS:
        yield f"{len(report.steps)} steps are few; record {FEW_STEPS} or more."
    if coverage.known and coverage.complete:
        yield "The profiler makes each call of the host slower: without it the device idles less."


# ---- the rest -------------------------------------------------------------------------------------------------------


def facts(report: TraceReport) -> Iterator[tuple[str, str]]:
    """(label, text) of everything that the trace says in one number or line."""
    others = len(report.streams) - 1
    if report.rank is not None:
        yield "rank", str(report.rank)
    yield "device", f"{report.device}{f' ({report.gpu})' if report.gpu else ''}"
    yield "compute stream", f"{report.compute_stream}" + (f", one of {others + 1}" if others else "")
    yield "window", f"{report.window_s:.6g} s, {report.num_kernels} kernels, {report.num_copies} copies"
    if report.graph_launches is None:
        yield "graph launches", "not known: the trace has no runtime events"
    elif report.graph_launches.calls and not report.graph_launches.kernels:
        yield "graph launches", f"{report.graph_launches.calls}, but none of their kernels is in the trace"
    else:
        calls, kernels = report.graph_launches
        yield "graph launches", f"{calls}, with {kernels} of the kernels" if calls else "none"
    complete = report.coverage.complete
    yield "steps", f"{len(report.steps)}{'' if complete else ' of what is left'}: {report.how_steps}"
    steps = report.as_dict()["steps"]
    if complete and steps["ms_median"] is not None:
        yield "ms a step", f"{steps['ms_median']:.3f} (median), {steps['ms_p99']:.3f} (99th percentile)"
    active = report.step_active
    yield "step active", share(active) + (f", idle {100 * (1 - active):.2f} %" if active is not None else "")
    yield "kernel busy", f"{share(report.kernel_busy_in_steps)} over these steps, {share(report.kernel_busy)} over all"


def lines(report: TraceReport) -> Iterator[str]:
    yield f"{'trace':<{LABEL}}{plain(report.label)}"
    yield ""
    for question, answer in answers(report).items():
        yield from _wrapped(question, answer)
    yield ""
    for label, text in facts(report):
        yield from _wrapped(label, plain(text, 600))
    for note in report.notes:
        yield from _wrapped("note", plain(note, 600))
    for where, seconds in report.idle_s.items():
        if seconds:
            yield ""
            yield f"idle {where}: {1e3 * seconds:.3f} ms, by what the host was doing"
            causes = list(report.idle_by_cause(where == "inside steps").items())
            rest = sum(value for _, value in causes[8:])
            causes = causes[:8] + ([(f"{len(causes) - 8} more", rest)] if rest else [])
            yield from (
                f"{1e3 * value:>12.3f} ms {100 * value / seconds:>6.1f} %  {plain(name)}" for name, value in causes
            )
    longest = [gap for gap in report.longest(5) if gap.seconds > 0]
    if longest:
        yield ""
        yield "longest gaps"
        for gap in longest:
            where = "inside" if gap.inside else "before"
            yield f"{gap.ms:>12.3f} ms  {where} step {gap.step}, at {gap.start:.6f} s: {plain(gap.cause)}"


def _wrapped(label: str, text: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=f"{label:<{LABEL}}", subsequent_indent=" " * LABEL, break_on_hyphens=False
    )
