"""Notebook 07: its pictures. What they show is computed in `pays.py`, and by what the learner wrote."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.patches import Patch, Rectangle

from ..pictures.picture import COLORS, TEXT, Picture, figure, plain_axes
from ..profile.pairs import is_disturbed
from . import pays
from .live import Sliders
from .loop import request
from .measuring import RecordedRun
from .rounds import IDLE, draw_rounds

BLUE, ORANGE, RED, GREEN = (COLORS[name] for name in ("blue", "orange", "vermillion", "green"))
GREY = "#888888"


class Regime(Sliders):
    """A synchronous and an asynchronous loop on the virtual clock, from their beginning, with every block labelled. In
    a notebook, sliders set what host and device take for a step, and the slots of the asynchronous one."""

    controls = (
        ("host_ms", "host, ms", 0.2, 12.0, 0.2),
        ("device_ms", "device, ms", 1.0, 12.0, 0.2),
        ("slots", "slots", 1, 4, 1),
    )

    def __init__(self, host_ms: float, device_ms: float, slots: int = 2) -> None:
        self.host_ms, self.device_ms, self.slots = host_ms, device_ms, slots
        self._update()
        super().__init__(self.figure, "both loops on the virtual clock", self.axes)

    def _update(self) -> None:
        timelines = {}
        for name, slots in (("synchronous", None), (f"asynchronous, slots: {self.slots}", self.slots)):
            timeline = pays.exact(self.host_ms, self.device_ms, [request([1, 2, 3], new=12)], slots)
            step = pays.step_ms(self.host_ms, self.device_ms, slots)
            idle = max(step - self.device_ms, 0.0)
            words = f"{name}. A step takes {step:.3g} ms; of these the device idles for {idle:.3g} ms"
            timelines[words] = timeline
        until = 4.2e-3 * (self.host_ms + self.device_ms)
        drawn = draw_rounds(timelines, self.slots, window=(0.0, until))
        self.figure, self.axes = drawn.figure, drawn.axes
        self.figure.set_size_inches(12, 3.8)  # with its three sliders it has to fit a screen of 1366x768


def draw_regimes(runs: Sequence[RecordedRun], step_time: Callable[[float, float, int], float]) -> Picture:
    """For each recorded pair of runs how many times as fast the asynchronous one was, and what the learner's
    `step_time` says of it, over host / device."""
    picture = figure(9, 3.6)
    axes: Any = picture.axes
    for low, high, color, words in (
        (0.02, 0.06, "#F2F2F2", "little\nto hide"),
        (0.06, 1.0, "#E4F1FA", "device longer"),
        (1.0, 2.0, "#FBE9DF", "host longer"),
    ):
        hatch = "///" if low == 1.0 else None
        axes.axvspan(low, high, facecolor=color, edgecolor="white", hatch=hatch, linewidth=0, zorder=0)
        axes.text((low * high) ** 0.5, 2.13, words, ha="center", va="top", fontsize=9, color=TEXT)
    for run in runs:
        ratio = run.host_ms / run.device_ms
        mark, color = ("o", BLUE) if run.engine == "asyncbatch" else ("D", ORANGE)
        axes.scatter(ratio, 1 / (1 - run.saved), 46, color=color, marker=mark, edgecolor="black", linewidth=0.6)
        axes.scatter(ratio, pays.gain_of(run, step_time), 130, color=RED, marker="_", linewidth=2.2, zorder=4)
    for mark, color, words in (("o", BLUE, "asyncbatch"), ("D", ORANGE, "transformers"), ("_", RED, "your step_time")):
        axes.scatter([], [], 60, color=color, marker=mark, linewidth=2 if mark == "_" else 0.6, label=words)
    axes.legend(loc="center left", fontsize=9, framealpha=1)
    axes.set(xscale="log", xlim=(0.02, 2.0), ylim=(0.95, 2.2))
    axes.set(xlabel="host / device, of a synchronous step", ylabel="async: times as fast")
    axes.set_xticks([0.02, 0.05, 0.1, 0.2, 0.5, 1, 2], ["0.02", "0.05", "0.1", "0.2", "0.5", "1", "2"])
    axes.minorticks_off()
    picture.title = f"{len(runs)} recorded pairs of runs in three regimes"
    return picture


def draw_race(race: pays.Race, guess: float) -> Picture:
    """The ratio of each pair of runs, where their median lies, and the learner's guess. Disturbed pairs are crosses."""
    pairs = race.pairs
    picture = figure(9, 1.7)
    axes: Any = picture.axes
    each = list(zip(pairs.speedups, pairs.device_ratios, strict=True))
    for number, (speedup, ratio) in enumerate(each):
        disturbed = is_disturbed(ratio)
        y = 1.1 + 0.9 * number / max(len(each) - 1, 1)
        axes.scatter(speedup, y, 46, color=GREY if disturbed else BLUE, marker="x" if disturbed else "o", zorder=3)
    if pairs.interval is not None:
        low, high, confidence = pairs.interval
        axes.plot([low, high], [0.6, 0.6], color=BLUE, linewidth=6, solid_capstyle="butt")
        axes.annotate(f" {confidence:.0%} sure", (high, 0.6), va="center", fontsize=9)
    else:
        words = "disturbed, run me again" if pairs.void else "one pair is no conclusion"
        axes.text(
            0.5,
            0.2,
            words,
            transform=axes.transAxes,
            ha="center",
            color=RED,
            fontsize=11,
            bbox={"facecolor": "white", "edgecolor": "none"},
        )
    axes.axvline(1.0, color="black", linewidth=1)
    axes.axvline(guess, color=RED, linestyle="--", linewidth=1.6)
    axes.text(guess, 2.35, "your guess", ha="center", va="bottom", fontsize=9, color=RED)
    values = [*pairs.speedups, guess, 1.0]
    room = 0.12 * (max(values) - min(values)) + 0.01
    axes.set(xlim=(min(values) - room, max(values) + 1.6 * room), ylim=(0.2, 2.35))
    axes.set_yticks([0.6, 1.55], ["the median lies", "pairs of runs"])
    axes.set_xlabel("asynchronous: times as fast as synchronous")
    picture.title = f"{len(each)} pairs of runs"
    return picture


def draw_short(
    gain: Callable[[float, float, int, int], float], host_ms: float, device_ms: float, slots: int = 2
) -> Picture:
    """The gain over the length of an answer that ends at a stop token: the learner's function, and runs on the virtual
    clock."""
    picture = figure(8, 2.7)
    axes: Any = picture.axes
    lengths, served = np.arange(1, 49), (2, 4, 8, 16, 32)
    axes.plot(lengths, [gain(host_ms, device_ms, int(n), slots) for n in lengths], color=RED, linewidth=1.8,
              label="your gain_with_stops")  # fmt: skip
    measured = [pays.served_gain(host_ms, device_ms, n, slots) for n in served]
    axes.scatter(served, measured, 46, color=BLUE, zorder=3, label="served on the virtual clock")
    axes.axhline(1.0, color="black", linewidth=1)
    axes.set(xlim=(0, 49), xlabel="tokens of an answer, its stop token included", ylabel="async: times as fast")
    axes.legend(loc="lower right", fontsize=9)
    told = ", ".join(f"{n} tokens {value:.2f}" for n, value in zip(served, measured, strict=True))
    picture.title = f"host {host_ms:g} ms, device {device_ms:g} ms, slots {slots}: {told}"
    return picture


def draw_first_token(host_ms: float, device_ms: float, slots: int = 2) -> Picture:
    """How long a request waits for its first token, over the moment at which it arrives in a step, in both loops."""
    picture = figure(8, 2.7)
    axes: Any = picture.axes
    told = []
    for name, number, color, line in (("synchronous", None, BLUE, ".-"), ("asynchronous", slots, ORANGE, "x--")):
        arrivals, waits = pays.first_token_waits(host_ms, device_ms, number)
        told.append(f"{name} {np.mean(waits):.1f} ms")
        jump = next((place for place in range(1, len(waits)) if waits[place] > waits[place - 1]), len(waits))
        for part in (slice(0, jump), slice(jump, None)):  # whoever comes after the plan waits for the next one
            label = f"{told[-1]} on average" if part.start == 0 else None
            axes.plot(arrivals[part], waits[part], line, color=color, label=label)
    axes.set(xlabel="arrival, ms after a step has begun on the device", ylabel="until the first token, ms")
    axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
    axes.legend(loc="lower left", fontsize=9)
    picture.title = f"host {host_ms:g} ms, device {device_ms:g} ms, first token: {', '.join(told)} on average"
    return picture


def draw_periods(periods_ms: Sequence[float], first: int = 0) -> Picture:
    """The periods of the steps of a run, on a logarithmic axis. first: the number of the first one."""
    picture = figure(8, 2.2)
    axes: Any = picture.axes
    numbers = np.arange(first, first + len(periods_ms))
    axes.plot(numbers, periods_ms, ".", color=BLUE, markersize=5)
    axes.set(yscale="log", ylim=(3, 500), xlabel="decode step", ylabel="period, ms")
    axes.set_yticks([5, 10, 50, 100, 500], ["5", "10", "50", "100", "500"])
    axes.minorticks_off()
    axes.xaxis.get_major_locator().set_params(integer=True)
    picture.title = f"the periods of {len(periods_ms)} steps, from step {first}"
    return picture


def draw_pause(pause_ms: float, host_ms: float, device_ms: float, slots: int) -> Picture:
    """The steps of the device around one pause of the host, in the synchronous loop and in one with `slots` slots, each
    from the end of the step in whose commit the host pauses."""
    picture = figure(9, 2.0)
    axes: Any = picture.axes
    until, told = pause_ms + 4 * (host_ms + device_ms), []
    for row, number in enumerate((1, slots)):
        run = pays.paused_run(pause_ms, host_ms, device_ms, number)
        begin = run.ends[pays.PAUSED]
        axes.add_patch(Rectangle((-device_ms, row), until + device_ms, 0.8, **IDLE))
        for step, (start, end) in enumerate(zip(run.starts - begin, run.ends - begin, strict=True)):
            if end > -device_ms and start < until:
                axes.add_patch(Rectangle((start, row), end - start, 0.8, facecolor=BLUE, edgecolor="white"))
                if (start + end) / 2 < until:
                    axes.text((start + end) / 2, row + 0.4, step, color="white", ha="center", va="center", fontsize=8)
        told.append("synchronous" if number == 1 else f"slots: {number}")
    axes.annotate(
        "", (0, -0.25), (pause_ms, -0.25), arrowprops={"arrowstyle": "<->", "color": RED, "shrinkA": 0, "shrinkB": 0}
    )
    axes.text(pause_ms / 2, -0.4, f"the host pauses, {pause_ms:g} ms", ha="center", va="bottom", fontsize=9, color=RED)
    axes.set(xlim=(-device_ms, until), ylim=(1.9, -1.0), xlabel=f"ms since the end of step {pays.PAUSED}")
    axes.set_yticks([0.4, 1.4], told)
    picture.title = f"a pause of {pause_ms:g} ms with {' and '.join(told)}"
    return picture


def draw_jitter(runs: Mapping[str, pays.Served]) -> Picture:
    """The periods of the steps of runs below each other, each with its three numbers."""
    picture = figure(8, 1.7 * len(runs) + 0.3)
    fig: Any = picture.figure
    picture.axes.remove()  # type: ignore[union-attr]
    every = fig.subplots(len(runs), sharex=True, sharey=True, squeeze=False)[:, 0]
    most = max(max(run.periods_ms) for run in runs.values())
    for axes, (name, run) in zip(every, runs.items(), strict=True):
        plain_axes(axes)
        axes.plot(run.periods_ms, ".", color=BLUE, markersize=5)
        axes.set_title(f"{name}: {pays.three_numbers(run.periods_ms)}", loc="left", fontsize=10, parse_math=False)
        axes.set(yscale="log", ylim=(1, 2 * most), ylabel="period, ms")
        axes.set_yticks([y for y in (1, 10, 100, 1000) if y < 2 * most])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    every[-1].set_xlabel("decode step")
    picture.title = f"the periods of {len(runs)} runs: {', '.join(runs)}"
    return picture


def draw_ways(ways: Mapping[str, pays.Way]) -> Picture:
    """For each server how its time is divided between a device that works and one that idles, with its tokens per
    second and what a stop wastes."""
    picture = figure(9.5, 0.42 * len(ways) + 0.9)
    axes: Any = picture.axes
    for row, way in enumerate(ways.values()):
        active = 100 * (1 - way.idle)
        axes.barh(row, active, 0.7, color=BLUE)
        axes.add_patch(Rectangle((active, row - 0.35), 100 - active, 0.7, **IDLE))
        wasted = f"up to {way.wasted} token{'s' * (way.wasted > 1)}" if way.wasted else "nothing"
        words = f"idle {100 * way.idle:.0f} %, {way.tokens_per_s:.0f} tokens/s; a stop wastes {wasted}"
        axes.text(102, row, words, va="center", fontsize=9)
    axes.set_yticks(range(len(ways)), list(ways))
    axes.set(ylim=(len(ways) - 0.4, -0.6), xlim=(0, 182))
    axes.set_xlabel("% of the time", loc="left")
    axes.set_xticks([0, 25, 50, 75, 100])
    looks = [Patch(color=BLUE, label="device active"), Patch(label="device idle", **IDLE)]
    picture.figure.legend(handles=looks, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    picture.title = "; ".join(f"{name}: idle {100 * way.idle:.0f} %" for name, way in ways.items())
    return picture
