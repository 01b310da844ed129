"""What the first minute found, in sentences and one table. Terminal and page show the same."""

from __future__ import annotations

from dataclasses import dataclass

from ..profile.document import percent
from ..profile.report import OWN, Report, Run
from ..timeline import Timeline
from .measuring import Answer, Beside, Here, Recorded
from .replay import RECORDING, WORDS

WHAT = (
    "A language model server works in steps: the host (Python, on the CPU) prepares a batch, the device (a GPU) "
    "computes it. In turns, the device waits while the host works. Asynchronous batching prepares the next batch while "
    "the device computes this one: the same model, the same tokens, less time."
)
WHO = (
    "Who gains: whoever serves models where a step takes the device a few milliseconds, as on a fast GPU, with a small "
    "or a quantized model, or with a busy host. Where a step takes far longer than the host's work, there is little to "
    "gain."
)
HEAD = ("", "idle, sync", "idle, async", "speed, async / sync")
NEXT = (
    ("your own model, and why it is idle", "asyncbatch profile --model ... --out out"),
    ("the notebooks: you write the loop", "asyncbatch lab"),
    ("what goes wrong without each wait", "asyncbatch faults"),
)
VOID = "void"


@dataclass(frozen=True)
class Findings:
    """point: the sentence that the minute is about. emulated: what is emulated in it, and what is not. rows: of the
    table under `HEAD`. here: the verdict for this machine as it is, None where the embedded model could not be had;
    then `missing` says why. timelines, captions: both loops beside the recorded GPU, and what is said of each."""

    point: str
    emulated: str
    rows: tuple[tuple[str, ...], ...]
    here: str | None
    missing: str | None
    answers: tuple[Answer, ...]
    same_tokens: bool
    timelines: tuple[Timeline, ...]
    captions: tuple[str, ...]
    again: str
    date: str
    machine: str


def findings(here: Here | None, beside: Beside, missing: str | None = None) -> Findings:
    reports = [beside.report, *([here.report] if here else [])]
    gain = beside.report.async_speedup
    return Findings(
        point=point(beside),
        emulated=emulated(beside),
        rows=tuple(rows(here, beside)),
        here=verdict_here(here.report) if here else None,
        missing=missing,
        answers=here.answers if here else (),
        same_tokens=all(report.same_tokens is not False for report in reports),
        timelines=beside.replayed if gain is None else beside.timelines,
        captions=tuple(caption(run, gain is None) for run in beside.report.runs),
        again=beside.report.command or "",
        date=beside.report.date or "",
        machine=beside.report.machine or "",
    )


def of_mode(report: Report, mode: str) -> Run:
    return next(run for run in report.runs if run.engine == OWN and run.mode == mode)


# ---- beside the recorded GPU --------------------------------------------------------------------------------------


def point(beside: Beside) -> str:
    """What overlapping gives back: measured here, or, where this machine was too busy for that, as it was recorded."""
    gpu, gain = beside.recording.gpu["name"], beside.report.async_speedup
    if gain is None:
        return _as_recorded(beside)
    idle, left = (of_mode(beside.report, mode).idle or 0.0 for mode in ("sync", "async"))
    beginning = f"Beside an {gpu} that serves an 8B model, your host leaves it idle for {100 * idle:.0f} % of the time"
    if gain < 1:
        return f"{beginning}; overlapping gives nothing back here: {gain:.2f}x as fast."
    some = "that" if left < idle / 4 else f"part of that (all but {100 * left:.0f} %)"
    return f"{beginning}; overlapping gives {some} back: {gain:.2f}x as fast."


def _void(report: Report) -> str:
    ratio = max((max(one, 1 / one) for one in report.comparisons[0].device_ratios or ()), default=None)
    how = f" (equal steps took up to {ratio:.2f}x as long)" if ratio else ""
    return (
        f"This machine is too busy just now to measure its own host beside a GPU{how}: run it again when it is quiet."
    )


def _as_recorded(beside: Beside) -> str:
    pair = beside.busier
    return (
        f"As it was recorded on an {beside.recording.gpu['name']} with {WORDS}: the host left it idle for "
        f"{100 * pair.idle_sync:.0f} % of the time; overlapping gave that back: {pair.gain:.2f}x as fast."
    )


def emulated(beside: Beside) -> str:
    """What of the drawing is emulated, and what is real."""
    run, recording = of_mode(beside.report, "sync"), beside.recording
    if beside.report.async_speedup is None:
        return (
            f"{_void(beside.report)} The drawing shows no run of this machine, but both loops on a virtual clock, "
            f"with the times of that GPU and of its own host ({RECORDING})."
        )
    return (
        f"Emulated: the GPU. Its steps take as long as they took on an {recording.gpu['name']} on "
        f"{recording.data['date'][:10]} ({recording.name}), and compute nothing. Real: the host's work, which is this "
        f"machine's, for {run.batch_size} requests at a time. {beside.report.workload.repeats} runs of each loop, in "
        "turns."
    )


def caption(run: Run, void: bool) -> str:
    loop = {"sync": "in turns (synchronous)", "async": "overlapped (asynchronous)"}[str(run.mode)]
    return loop + (", as recorded" if void else f": device idle {percent(run.idle)}")


# ---- this machine, and the table ----------------------------------------------------------------------------------


def verdict_here(report: Report) -> str:
    """What asynchronous batching brings to this machine as it is, by its own synchronous run."""
    run = of_mode(report, "sync")
    device = "this CPU" if str(report.device).startswith("cpu") else f"this {report.device}"
    guess = run.prediction
    if guess is None or guess.gain is None or guess.device_ms is None or guess.between_ms is None:
        return f"On {device}: not measured."
    because = (
        f"a step takes the device {guess.device_ms:.1f} ms, and {guess.between_ms:.1f} ms lie between two steps: "
        f"{guess.gain:.2f}x by prediction"
    )
    brings = "it would pay" if guess.helps else "nothing to gain"
    return f"On {device}, with the embedded model of 135M: {brings}, because {because}."


def rows(here: Here | None, beside: Beside) -> list[tuple[str, ...]]:
    """The table: measured here, recorded there, and this machine as it is."""
    gpu, report = beside.recording.gpu["name"].removeprefix("NVIDIA "), beside.report
    sync, other, gain = of_mode(report, "sync"), of_mode(report, "async"), report.async_speedup
    requests = f"8B, {sync.batch_size} requests"
    measured = (VOID,) * 3 if gain is None else (percent(sync.idle), percent(other.idle), f"{gain:.2f}x")
    made: list[tuple[str, ...]] = [(f"your host beside an {gpu} (emulated): {requests}", *measured)]
    for one in beside.recorded:
        engine = "" if one.engine == OWN else f", {one.engine}"
        made.append(_row(f"its own host{engine} (recorded): {requests}", one))
    made.append(_row(f"its own host (recorded): 1B, {beside.busier.rows} requests", beside.busier))
    if here is not None:
        run = of_mode(here.report, "sync")
        guess = run.prediction.gain if run.prediction else None
        predicted = "-" if guess is None else f"{guess:.2f}x (predicted)"
        who = f"this machine as it is: 135M, {len(here.answers)} requests"
        made.append((who, percent(run.idle), percent(of_mode(here.report, "async").idle), predicted))
    return made


def _row(who: str, one: Recorded) -> tuple[str, ...]:
    return who, percent(one.idle_sync), percent(one.idle_async), f"{one.gain:.2f}x"
