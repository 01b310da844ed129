"""Notebooks 00 and 01: pictures of batches, of a device's steps, and of the law of the idle device.

Their servers are in `serving.py`, the toy device of 01 in `batching.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.patches import Rectangle

from ..measure import law
from ..pictures import plot
from ..pictures.picture import COLORS, TEXT, Picture, figure
from .batching import Asked, ToyDevice, asked
from .live import Sliders
from .serving import device_ms, exact, point, serve, step_ms, steps, timed

__all__ = [
    "PUBLISHED",
    "RECORDED",
    "Asked",
    "GainLaw",
    "IdleLaw",
    "ToyDevice",
    "asked",
    "device_ms",
    "draw_batches",
    "draw_budget",
    "draw_costs",
    "draw_gaps",
    "draw_periods",
    "exact",
    "plot",
    "point",
    "serve",
    "step_ms",
    "steps",
    "timed",
]
REQUEST_COLORS = ("sky", "orange", "green", "yellow", "blue", "purple", "vermillion")


def draw_batches(batches: Mapping[str, Sequence[Sequence[int | None]]]) -> Picture:
    """Batches below each other, on one axis of steps. `batches[title][row][step]` is the number of the request that the
    row computes in that step, or None for a wasted place, which is hatched."""
    steps = max(len(row) for rows in batches.values() for row in rows)
    picture = figure(8, 0.5 + 0.3 * sum(len(rows) + 2 for rows in batches.values()))
    axes: Any = picture.axes
    top, captions = 0, []
    for title, rows in batches.items():
        wasted = sum(place is None for row in rows for place in row)
        captions.append(f"{title}: {len(rows[0])} steps, {wasted} of {sum(map(len, rows))} places wasted")
        axes.text(0, top + 0.75, captions[-1], fontsize=10, fontweight="bold", parse_math=False)
        for number, row in enumerate(rows):
            axes.text(-0.15, top + 1.5 + number, f"row {number}", ha="right", va="center", fontsize=9)
            for step, place in enumerate(row):
                _draw_place(axes, step, top + 1 + number, place)
        top += len(rows) + 2
    axes.set(xlim=(-1.2, steps + 0.1), ylim=(top - 0.8, 0), xlabel="step", yticks=[])
    axes.set_xticks([step + 0.5 for step in range(steps)], [str(step) for step in range(steps)])
    axes.spines[:].set_visible(False)
    picture.title = "; ".join(captions)
    return picture


def _draw_place(axes: Any, step: int, row: int, place: int | None) -> None:
    if place is None:
        axes.add_patch(Rectangle((step, row), 1, 1, facecolor="white", edgecolor="#999999", hatch="///", linewidth=0.5))
        return
    color = REQUEST_COLORS[place % len(REQUEST_COLORS)]
    ink = "white" if color in ("blue", "green", "vermillion") else "black"
    axes.add_patch(Rectangle((step, row), 1, 1, facecolor=COLORS[color], edgecolor="white", linewidth=1.5))
    axes.text(step + 0.5, row + 0.5, str(place), ha="center", va="center", color=ink, fontsize=9)


def draw_costs(cost: dict[int, float]) -> Picture:
    """What a step costs, and what a token costs, over the rows of the batch. cost: the milliseconds of a step, for each
    number of rows."""
    picture = figure(8, 2.6)
    axes: Any = picture.axes
    places = range(len(cost))
    series = (
        ("a step", "blue", "o", list(cost.values())),
        ("a token", "orange", "s", [ms / n for n, ms in cost.items()]),
    )
    for label, color, marker, values in series:
        axes.plot(places, values, marker + "-", color=COLORS[color], linewidth=2, markersize=7)
        axes.annotate(label, (places[-1], values[-1]), (10, 0), textcoords="offset points", va="center", fontsize=10)
    axes.set(
        xlabel="rows in the batch",
        ylabel="milliseconds",
        ylim=(0, 1.15 * max(cost.values())),
        xlim=(-0.3, len(cost) - 0.4),
    )
    axes.set_xticks(places, [str(rows) for rows in cost])
    picture.title = f"cost of a step and of a token, {min(cost)} to {max(cost)} rows"
    return picture


def draw_budget(chunk_sizes: Sequence[int], free_rows: int, budget: int, admitted: int) -> Picture:
    """Waiting chunks along an axis of tokens. The first `admitted` join the step, the others (hatched) wait."""
    picture = figure(8, 1.5)
    axes: Any = picture.axes
    at = 0
    for number, size in enumerate(chunk_sizes):
        joins = number < admitted
        look = {"facecolor": COLORS["sky"]} if joins else {"facecolor": "white", "hatch": "///"}
        axes.add_patch(Rectangle((at, 0), size, 1, edgecolor="#555555", linewidth=1, **look))
        text = axes.text(
            at + size / 2, 0.5, f"{size} {'joins' if joins else 'waits'}", ha="center", va="center", fontsize=9
        )
        text.set_bbox({"facecolor": "none" if joins else "white", "edgecolor": "none", "pad": 1})
        at += size
    axes.plot([budget, budget], [0, 1.2], "--", color=COLORS["vermillion"], linewidth=2)
    axes.text(budget, 1.4, f"budget {budget} tokens, {free_rows} free rows", ha="center", fontsize=9)
    axes.set(xlim=(0, 1.15 * max(at, budget)), ylim=(0, 1.7), yticks=[], xlabel="prompt tokens")
    axes.spines[["left"]].set_visible(False)
    picture.title = f"{admitted} of {len(chunk_sizes)} waiting chunks join"
    return picture


def draw_periods(starts: Sequence[float], ends: Sequence[float]) -> Picture:
    """The steps of a device as numbered blocks. Below each of them but the first is its period, with how much of it is
    active."""
    picture = figure(8, 1.7)
    axes: Any = picture.axes
    _draw_steps(axes, starts, ends)
    for number in range(1, len(starts)):
        before, end = ends[number - 1], ends[number]
        arrow = {"arrowstyle": "<->", "color": TEXT, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", (before, 1.3), (end, 1.3), arrowprops=arrow)
        active = f"period {end - before:g}, active {end - starts[number]:g}"
        axes.text((before + end) / 2, 1.8, active, ha="center", va="center", fontsize=9)
    axes.set(xlim=(min(starts[0], 0), ends[-1]), ylim=(2.2, -0.1), xlabel="milliseconds")
    axes.set_yticks([0.45, 1.3], ["compute", "periods"])
    picture.title = f"{len(starts)} steps and {len(starts) - 1} periods"
    return picture


def draw_gaps(starts: Sequence[float], ends: Sequence[float], gaps: Sequence[tuple[int, float]]) -> Picture:
    """The steps of a device as numbered blocks, and below them somebody's answer for the gaps between them: pairs as
    `idle_gaps` gives them. Each gap is drawn as long as the answer says, and ends where its step begins."""
    picture = figure(8, 1.6)
    axes: Any = picture.axes
    red = COLORS["vermillion"]
    _draw_steps(axes, starts, ends)
    for number, seconds in gaps:
        axes.add_patch(
            Rectangle((starts[number] - seconds, 1), seconds, 0.9, facecolor="#FBE9DF", edgecolor=red, hatch="///")
        )
        axes.text(starts[number] - seconds / 2, 2.2, f"{seconds:g}", ha="center", va="center", fontsize=9)
    axes.set(xlim=(min(starts[0], 0), ends[-1]), ylim=(2.6, -0.1), xlabel="milliseconds")
    axes.set_yticks([0.45, 1.45], ["compute", "gaps found"])
    picture.title = f"{len(starts)} steps, {len(gaps)} gaps found"
    return picture


def _draw_steps(axes: Any, starts: Sequence[float], ends: Sequence[float]) -> None:
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        block = Rectangle((start, 0), end - start, 0.9, facecolor=COLORS["blue"], edgecolor="white")
        axes.add_patch(block)
        axes.text((start + end) / 2, 0.45, f"step {number}", ha="center", va="center", color="white", fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.spines[["left"]].set_visible(False)


class Recorded(NamedTuple):
    """A server that somebody measured: the seconds that its two loops took for `steps` steps, and the device's idle
    share in the synchronous one, from 0 to 1. The properties are derived from these, here and nowhere else."""

    label: str
    sync_s: float
    async_s: float
    idle: float
    steps: int = 1

    @property
    def sync_ms(self) -> float:
        """A step of the synchronous loop."""
        return 1e3 * self.sync_s / self.steps

    @property
    def async_ms(self) -> float:
        """A step of the asynchronous loop."""
        return 1e3 * self.async_s / self.steps

    @property
    def host_ms(self) -> float:
        """The host's part of a synchronous step, in which the device idles."""
        return self.idle * self.sync_ms

    @property
    def device_ms(self) -> float:
        """The device's part of a synchronous step."""
        return self.sync_ms - self.host_ms


# Hugging Face, "Unlocking asynchronicity in continuous batching" (2026-05): an 8B model, 32 requests of about 8K new
# tokens, one H200. The three numbers are published. That they are for 8192 steps is ours: one for each new token.
PUBLISHED = Recorded("8B, long texts, published by Hugging Face", 300.6, 234.5, 0.240, steps=8192)
# Batches of 32 on one H200. This project measured all but the first in 2026-11, with `generate_batch` of transformers
# 5.23 and CUDA graphs. Long texts have 8192 new tokens, short ones 512; of those, the time of one step was noted.
RECORDED = (
    PUBLISHED,
    Recorded("8B, long texts, transformers 5.23", 118.8, 106.1, 0.105, steps=8192),
    Recorded("8B, short texts, transformers 5.23", 11.0e-3, 9.08e-3, 0.169),
    Recorded("0.6B, short texts, transformers 5.23", 5.71e-3, 4.42e-3, 0.220),
    Recorded("1B, short texts, transformers 5.23", 4.79e-3, 3.03e-3, 0.356),
)


class Law(Sliders):
    """A picture of a law, with a star for one server. In a notebook, two sliders, logarithmic as the axis is, set the
    milliseconds that its host and its device take for a step. A subclass draws the law, moves the star in `_update`,
    and calls `_settle` at the end."""

    controls: tuple[tuple[str, str, float, float, float | None], ...] = (
        ("host_ms", "host, ms", 0.1, 20.0, None),
        ("device_ms", "device, ms", 0.5, 100.0, None),
    )
    host_ms: float
    device_ms: float

    def _settle(self) -> None:
        self._update()
        self.figure.draw_without_rendering()
        self.figure.set_layout_engine("none")  # laid out once: redrawing then takes half the time


class IdleLaw(Law):
    """The idle share over the device's time for a step, with measured servers and one to play with."""

    def __init__(self, host_ms: float, device_ms: float) -> None:
        picture = figure(8, 3.8, "Idle share of the synchronous loop = host / (host + device)")
        super().__init__(picture.figure, "idle share over device time", picture.axes)
        self.host_ms, self.device_ms = host_ms, device_ms
        axes: Any = picture.axes
        self._axes = axes
        blue, orange, red = COLORS["blue"], COLORS["orange"], COLORS["vermillion"]
        for ms in (0.5, 2.0, 8.0):
            axes.plot(*self._law(ms), "--", color="#999999", linewidth=1)
            paper = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            where = {"ha": "center", "va": "center", "zorder": 4, "bbox": paper}
            axes.text(0.8, 100 * law.idle_share(ms, 0.8), f"host {ms:g} ms", fontsize=8, **where)
        for letter, run in zip("ABCDE", RECORDED, strict=True):
            x, y = run.device_ms, 100 * run.idle
            axes.plot(x, y, "o", markersize=13, color=orange, label=f"{letter}  {run.label}", zorder=4)
            axes.text(x, y, letter, ha="center", va="center", fontsize=9, zorder=5)
        (self._curve,) = axes.plot([], [], color=blue, linewidth=2.5, zorder=3)
        (self._star,) = axes.plot([], [], "*", markersize=16, color=red, markeredgecolor="black", zorder=6)
        axes.set(
            xscale="log", xlim=(0.5, 100), ylim=(0, 100), xlabel="device time of a step, milliseconds", ylabel="idle, %"
        )
        axes.set_xticks([0.5, 1, 2, 5, 10, 20, 50, 100], ["0.5", "1", "2", "5", "10", "20", "50", "100"])
        axes.minorticks_off()
        self._settle()

    @property
    def idle(self) -> float:
        """The idle share of the server to play with, from 0 to 1."""
        return law.idle_share(self.host_ms, self.device_ms)

    def _law(self, host_ms: float) -> tuple[list[float], list[float]]:
        x = [0.5 * 200 ** (i / 100) for i in range(101)]  # 0.5 to 100 ms, evenly on a log axis
        return x, [100 * law.idle_share(host_ms, device_ms) for device_ms in x]

    def _update(self) -> None:
        self._curve.set_data(*self._law(self.host_ms))
        self._star.set_data([self.device_ms], [100 * self.idle])
        self._star.set_label(f"host {self.host_ms:g} ms, device {self.device_ms:g} ms: idle {100 * self.idle:.0f} %")
        self._axes.legend(loc="upper right", fontsize=8, markerscale=0.6)


class GainLaw(Law):
    """How many times as fast the asynchronous loop is, over host / device, with one server to play with.

    runs: measured servers, as label -> (ms of the host, ms of the device, times as fast)."""

    def __init__(self, runs: dict[str, tuple[float, float, float]], host_ms: float, device_ms: float) -> None:
        picture = figure(8, 3.8, "The most that overlapping can bring = (host + device) / the longer of the two")
        super().__init__(picture.figure, "gain over host / device", picture.axes)
        self.host_ms, self.device_ms = host_ms, device_ms
        axes: Any = picture.axes
        self._axes = axes
        lowest = min([0.8, *(gain - 0.1 for _, _, gain in runs.values())])  # (a measured run can be slower, by chance)
        ratios = [0.0005 * 100000 ** (i / 200) for i in range(201)]  # 0.0005 to 50, evenly on a log axis
        axes.plot(ratios, [law.overlap_gain(ratio, 1) for ratio in ratios], color=COLORS["blue"], linewidth=2.5)
        axes.axvline(1, color="#999999", linestyle="--", linewidth=1)
        for x, side, words in (
            (0.85, "right", "device slower:\nall host work hides"),
            (1.2, "left", "host slower:\ndevice waits"),
        ):
            axes.text(x, lowest + 0.03, words, ha=side, va="bottom", fontsize=9)
        for letter, (label, (host, device, gain)) in zip("ABCDE", runs.items(), strict=False):
            axes.plot(
                host / device,
                gain,
                "o",
                markersize=13,
                color=COLORS["orange"],
                label=f"{letter}  {label}",
                zorder=4,
            )
            axes.text(host / device, gain, letter, ha="center", va="center", fontsize=9, zorder=5, clip_on=True)
        (self._star,) = axes.plot(
            [], [], "*", markersize=16, color=COLORS["vermillion"], markeredgecolor="black", zorder=6
        )
        axes.set(
            xscale="log",
            xlim=(0.0005, 50),
            ylim=(lowest, 2.15),
            xlabel="host work / device step (milliseconds / milliseconds)",
            ylabel="times as fast",
        )
        axes.set_xticks([0.001, 0.01, 0.1, 1, 10], ["0.001", "0.01", "0.1", "1", "10"])
        axes.minorticks_off()
        self._settle()

    @property
    def gain(self) -> float:
        """What overlapping can bring the server to play with: 1 to 2."""
        return law.overlap_gain(self.host_ms, self.device_ms)

    def _update(self) -> None:
        self._star.set_data([self.host_ms / self.device_ms], [self.gain])
        self._star.set_label(f"host {self.host_ms:g} ms, device {self.device_ms:g} ms: {self.gain:.2f} times")
        self._axes.legend(loc="upper left", fontsize=8, markerscale=0.6)
