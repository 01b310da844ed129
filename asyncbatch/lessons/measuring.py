"""Notebook 06: how an idle device is measured, and pictures of what was found. The notebook takes all that it needs
from here. (Exercises: `exercises/measuring.py`; the recorded H200 on the virtual clock: `replay.py`.)"""

from __future__ import annotations

import contextlib
import io
import json
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ..batcher import SyncBatcher
from ..measure.attribution import Attribution
from ..measure.law import idle_share
from ..measure.recording import Recording
from ..measure.simulate import WhatIf
from ..measure.steps import steps_of
from ..models.toy import toy_llama
from ..pictures.picture import COLORS, TEXT, Picture, figure
from ..profile.cli import main
from ..profile.report import Report
from ..scheduler import StepKind
from ..timeline import busy_curve
from .idle import Law
from .lab import spend_on_gpu
from .replay import (
    PAUSED,
    compared,
    intervals,
    on_your_host,
    recorded_gaps,
    replayed,
    sent_trace,
    simulated,
    two_engines,
    without,
)

__all__ = [
    "Look",
    "compared",
    "draw_attribution",
    "draw_gap_lengths",
    "draw_launch",
    "draw_law",
    "draw_union",
    "draw_what_if",
    "first_screen",
    "intervals",
    "on_your_host",
    "profile",
    "recorded_gaps",
    "recorded_runs",
    "replayed",
    "sent_trace",
    "simulated",
    "timed_step",
    "two_engines",
    "without",
]

# ---- what is measured ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def timed_step(device: str, ms: float) -> Iterator[tuple[Callable[[], Any], Callable[[], Any]]]:
    """Two functions, (launch, synchronize), of work that keeps a device busy for `ms` milliseconds. The device is the
    GPU if `device` is "cuda"; else it is a timed device, a process that waits. Both functions have been used once, so
    that the first measurement does not include the loading of anything."""
    if device == "cuda":
        spend = spend_on_gpu()
        launch, synchronize = (lambda: spend(ms)), torch.cuda.synchronize
        launch()
        synchronize()
        yield launch, synchronize
        return
    with SyncBatcher(toy_llama(), max_batch_size=1, step_s=1e-3 * ms) as batcher:
        compute = batcher.device.streams[1]
        step = StepKind("decode", sampled=False, rows=1)
        compute.launch(step, 0)
        compute.synchronize()
        yield lambda: compute.launch(step, 0), compute.synchronize


def profile(*arguments: str) -> Report:
    """The report of `python -m asyncbatch.profile` with these arguments, and none of what it prints on stderr. If it
    fails, RuntimeError with that text."""
    report, messages = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(report), contextlib.redirect_stderr(messages):
        status = main([*arguments, "--json"])
    if status:
        raise RuntimeError(f"the profiling script ended with status {status}: {messages.getvalue().strip()}")
    return Report.from_json(json.loads(report.getvalue()))


def first_screen(report: Report) -> str:
    """What is to be read first in a report, a paragraph for each sentence."""
    return "\n".join(textwrap.fill(sentence, 88, subsequent_indent="  ") for sentence in report.sentences)


def seen_share(starts, ends, window_s: float) -> float:
    """The share of all windows of `window_s` seconds in which a span runs, if only for a moment. A window can begin at
    any time from the start of the first span to the start of the last. With windows of 0 s it is the share of busy
    time."""
    starts, ends = np.asarray(starts, float), np.asarray(ends, float)
    # A window sees a span if it begins before the span's end, and not more than its own length before its start.
    times, busy = busy_curve(starts - window_s, ends)
    first, last = starts.min(), starts.max()
    return float(np.diff(np.interp([first, last], times, busy))[0] / (last - first))


class RecordedRun(NamedTuple):
    """A recorded synchronous run, and the asynchronous run that is its twin.

    host_ms, device_ms: milliseconds of a synchronous decode step, medians; host_ms_async: of an asynchronous one. idle,
    idle_async: idle shares of the decode steps. saved: the share of the wall time that the asynchronous run saved.
    """

    recording: str
    engine: str
    model: str
    rows: int
    host_ms: float
    device_ms: float
    idle: float
    host_ms_async: float
    idle_async: float
    saved: float

    @property
    def law(self) -> float:
        """The idle share that follows from host_ms and device_ms."""
        return idle_share(self.host_ms, self.device_ms)

    @property
    def label(self) -> str:
        texts = {"h200-llama-8b": "long texts", PAUSED: "older code"}.get(self.recording, "short texts")
        return f"{self.model}, {self.rows} row{'s' if self.rows > 1 else ''}, {texts}"


def recorded_runs() -> list[RecordedRun]:
    """All recorded synchronous runs of both engines that have an asynchronous twin: by engine, the least idle first."""
    twins = []
    for name in Recording.names():
        alone = [run for run in Recording.load(name).runs if run.get("tp", 1) * run.get("replicas", 1) == 1]  # one GPU
        runs = {(r["engine"], r["model"], r["batch_size"], r["mode"]): r for r in alone}
        for (engine, model, rows, mode), run in runs.items():
            twin = runs.get((engine, model, rows, "async"))
            if mode != "sync" or twin is None:
                continue
            steps, other = steps_of(run), steps_of(twin).totals()
            totals, size = steps.totals(), model.removeprefix("random:llama-").upper()
            device_ms = 1e-3 * float(np.median(steps.device_us[steps.kind == "decode"]))
            times = totals["host_ms_per_step"], device_ms, totals["idle"], other["host_ms_per_step"], other["idle"]
            twins.append(RecordedRun(name, engine, size, rows, *times, 1 - other["wall_s"] / totals["wall_s"]))
    return sorted(twins, key=lambda run: (run.engine, run.idle))


# ---- pictures --------------------------------------------------------------------------------------------------------

BLUE, ORANGE, RED = COLORS["blue"], COLORS["orange"], COLORS["vermillion"]
WINDOWS_MS = np.geomspace(0.1, 1000, 161)  # of `Look`


def draw_launch(back_ms: float, done_ms: float) -> Picture:
    """What the host measures if it does not wait, above what happened on the device."""
    picture = figure(8, 1.9, "One step: what the host measured, and what happened")
    axes: Any = picture.axes
    axes.broken_barh([(0, back_ms)], (1.25, 0.6), facecolor=ORANGE, edgecolor="black", linewidth=0.8)
    axes.broken_barh([(back_ms, done_ms - back_ms)], (0.25, 0.6), facecolor=BLUE)
    axes.text((back_ms + done_ms) / 2, 0.55, "the step", color="white", ha="center", va="center", fontsize=10)
    axes.annotate(
        f"launch: the host is back after {back_ms:.2f} ms", (back_ms, 1.55), (0.08 * done_ms, 1.55), va="center",
        fontsize=10, arrowprops={"arrowstyle": "->", "color": TEXT},
    )  # fmt: skip
    axes.axvline(done_ms, color=RED, linestyle="--", linewidth=1.5)
    axes.text(done_ms * 0.99, 1.55, f"done after {done_ms:.2f} ms", ha="right", va="center", fontsize=10, color=RED)
    axes.set(xlim=(0, 1.04 * done_ms), ylim=(0, 2.1), xlabel="ms since the call")
    axes.set_yticks([1.55, 0.55], ["host", "device"])
    return picture


def draw_union(starts: Sequence[float], ends: Sequence[float], union: Any, title: str = "") -> Picture:
    """Intervals, each in a row of its own, and below them somebody's answer for their union, as (starts, ends)."""
    picture = figure(8, 1.1 + 0.28 * len(starts), title)
    axes: Any = picture.axes
    for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
        _interval(axes, row, start, end, BLUE, "white")
    stretches = list(zip(*union, strict=True))
    for start, end in stretches:
        _interval(axes, len(starts) + 0.4, start, end, ORANGE, "black")
    total = sum(end - start for start, end in stretches)
    words = [f"interval {number}" for number in range(len(starts))] + [f"stretches: {total:g} ms busy"]
    axes.set_yticks([*range(len(starts)), len(starts) + 0.4], words)
    axes.set(ylim=(len(starts) + 1, -0.6), xlabel="ms")
    picture.title = title or f"{len(starts)} intervals, {len(stretches)} stretches, {total:g} ms busy"
    return picture


def _interval(axes: Any, y: float, start: float, end: float, color: str, ink: str) -> None:
    axes.barh(y, end - start, 0.75, left=start, color=color, edgecolor="white", linewidth=1.5)
    axes.text((start + end) / 2, y, f"{start:g}-{end:g}", ha="center", va="center", color=ink, fontsize=8)


class Look(Law):
    """How busy a synchronous server seems to somebody who looks seldom: the share of windows in which a kernel ran,
    over the length of a window; and the true share. In a notebook, two sliders set the milliseconds that host and
    device take for a step."""

    def __init__(self, host_ms: float, device_ms: float) -> None:
        picture = figure(8, 3.2, "The same device, looked at through longer and longer windows")
        super().__init__(picture.figure, "share of windows with a kernel, over their length", picture.axes)
        self.host_ms, self.device_ms = host_ms, device_ms
        axes: Any = picture.axes
        self._axes = axes
        axes.axvspan(1000 / 6, 1000, color="#DDDDDD", label="nvidia-smi: windows of 1/6 to 1 s")
        (self._curve,) = axes.plot([], [], color=BLUE, linewidth=2.5)
        (self._truth,) = axes.plot([], [], "--", color=RED, linewidth=1.5)
        axes.set(xscale="log", xlim=(WINDOWS_MS[0], WINDOWS_MS[-1]), ylim=(0, 105))
        axes.set(xlabel="length of a window, ms", ylabel="windows with a kernel, %")
        axes.set_xticks([0.1, 1, 10, 100, 1000], ["0.1", "1", "10", "100", "1000"])
        axes.minorticks_off()
        self._settle()

    def seen(self, window_ms: float) -> float:
        """The share of windows of this length in which a kernel runs, from 0 to 1."""
        starts = np.arange(20) * (self.host_ms + self.device_ms)
        return seen_share(starts, starts + self.device_ms, window_ms)

    def _update(self) -> None:
        self._curve.set_data(WINDOWS_MS, [100 * self.seen(window) for window in WINDOWS_MS])
        truth = 100 * (1 - idle_share(self.host_ms, self.device_ms))
        self._truth.set_data([WINDOWS_MS[0], WINDOWS_MS[-1]], [truth, truth])
        times = f"{self.device_ms:g} ms of every {self.host_ms + self.device_ms:g} ms"
        self._truth.set_label(f"the truth: busy for {times}, {truth:.0f} %")
        self._curve.set_label("windows in which a kernel ran")
        self._axes.legend(loc="lower right" if truth > 40 else "center right", fontsize=9)


def draw_law(runs: Sequence[RecordedRun]) -> Picture:
    """Each run as a circle: the idle share that the law says, and the one that was measured; on the line they are
    equal. Below it the idle share of its asynchronous twin. The runs that are farthest off are named."""
    picture = figure(8, 4.4)
    axes: Any = picture.axes
    most = 100 * max(max(run.idle, run.law) for run in runs) + 4
    axes.plot([0, most], [0, most], "--", color=RED, linewidth=1.5, label="the law: host / (host + device)", zorder=1)
    for number, engine in enumerate(dict.fromkeys(run.engine for run in runs)):
        mine = [run for run in runs if run.engine == engine]
        law = [100 * run.law for run in mine]
        look: dict[str, Any] = {"edgecolor": "black", "linewidth": 0.6, "zorder": 3, "clip_on": False}
        color, marks = (BLUE, ORANGE)[number % 2], ("o", "s")[number % 2]
        axes.scatter(law, [100 * run.idle for run in mine], 50, color=color, marker=marks, label=engine, **look)
        twins = [100 * run.idle_async for run in mine]
        axes.scatter(law, twins, 34, color="white", marker="D", label="" if number else "asynchronous twin", **look)
    far, slow = max(runs, key=lambda run: abs(run.law - run.idle)), max(runs, key=lambda run: run.idle_async)
    for run, y, where in ((far, far.idle, (-20, 62)), (slow, slow.idle_async, (-130, -72))):
        axes.annotate(
            f"{run.engine}, {run.label}", (100 * run.law, 100 * y), where, textcoords="offset points", fontsize=8.5,
            arrowprops={"arrowstyle": "-", "color": TEXT, "shrinkB": 5},
        )  # fmt: skip
    axes.set(xlim=(0, most), ylim=(0, most), xlabel="idle by the law, %", ylabel="device idle, measured, %")
    axes.legend(loc="upper left", fontsize=9)
    picture.title = f"{len(runs)} recorded runs: law, sync, async"
    return picture


def draw_gap_lengths(gap_ms: Sequence[float]) -> Picture:
    """The idle gap before each step (ms), on a logarithmic axis, with the median and the longest one."""
    ms = np.maximum(np.asarray(gap_ms, float), 1e-3)
    picture = figure(8, 2.4, "The idle gap before each step")
    axes: Any = picture.axes
    axes.plot(ms, ".", color=BLUE, markersize=4, clip_on=False)
    median, worst = float(np.median(ms)), int(ms.argmax())
    axes.axhline(median, color=RED, linestyle="--", linewidth=1.5)
    axes.plot(worst, ms[worst], "D", color=ORANGE, markeredgecolor="black", markersize=8)
    axes.annotate(f"  the longest: {ms[worst]:.0f} ms", (worst, ms[worst]), va="center", fontsize=9)
    axes.annotate(f"median {median:.2f} ms", (1.17 * len(ms), median * 1.4), ha="right", fontsize=9, color=RED)
    axes.set(yscale="log", ylim=(0.05, 3 * ms[worst]), xlim=(0, 1.17 * len(ms)))
    axes.set(xlabel="decode step", ylabel="idle, ms")
    axes.set_yticks([y for y in (0.1, 1, 10, 100, 1000) if y < 3 * ms[worst]])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    return picture


def draw_attribution(attributions: Mapping[str, Attribution], most: int = 8) -> Picture:
    """Idle time by what the host was doing, in ms a step: for each attribution the `most` largest as bars."""
    rows = sum(min(len(one.by), most + 1) + 1.6 for one in attributions.values())
    picture = figure(8, 0.6 + 0.27 * rows)
    axes: Any = picture.axes
    y, places, words = 0.0, [], []
    each_ms = (1e3 * seconds / one.steps for one in attributions.values() for seconds in one.by.values())
    longest = max(each_ms, default=1.0)
    for label, one in attributions.items():
        each = 1e3 * one.idle_s / max(one.steps, 1)
        axes.text(0, y, f"{label}: idle for {each:.3f} ms a step", fontsize=10, fontweight="bold", va="center")
        y += 1
        bars = dict(list(one.by.items())[:most])
        if len(one.by) > most:
            bars["all others"] = one.idle_s - sum(bars.values())
        for name, seconds in bars.items():
            ms = 1e3 * seconds / one.steps
            axes.barh(y, ms, 0.75, color=BLUE)
            share = 100 * seconds / one.idle_s
            axes.text(ms + 0.01 * longest, y, f"{ms:.3f} ms, {share:.0f} %", va="center", fontsize=8)
            places.append(y)
            words.append(name)
            y += 1
        y += 0.6
    axes.set_yticks(places, words)
    axes.set(ylim=(y - 0.9, -0.7), xlim=(0, 1.25 * longest), xlabel="idle, ms a step")
    picture.title = f"idle time by latency point: {', '.join(attributions)}"
    return picture


def draw_what_if(changes: Sequence[WhatIf], most: int = 6) -> Picture:
    """How much time the first `most` latency points of the host would save in both loops if they took none."""
    removed = [one for one in changes if one.factor == 0 and one.where == "host"][:most]
    picture = figure(8, 1.1 + 0.42 * len(removed), "Time saved if this took no time at all")
    axes: Any = picture.axes
    for side, (key, color, label, hatch) in enumerate(
        (("sync_saves", BLUE, "synchronous loop", ""), ("async_saves", ORANGE, "asynchronous loop", "///"))
    ):
        for row, one in enumerate(removed):
            saved, y = 100 * max(getattr(one, key), 0.0), row + 0.4 * side
            options = {"color": color, "hatch": hatch, "edgecolor": "white", "label": "" if row else label}
            axes.barh(y, saved, 0.38, **options)
            axes.annotate(f"{saved:.2f} %", (saved, y), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks([row + 0.2 for row in range(len(removed))], [one.point for one in removed])
    axes.margins(x=0.12)
    axes.set(ylim=(len(removed) - 0.2, -0.4), xlabel="time saved, % of the loop's own time")
    axes.legend(loc="lower right", fontsize=9)
    picture.title = "what if: " + ", ".join(one.point for one in removed)
    return picture
