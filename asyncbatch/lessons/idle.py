"""Notebooks 00 and 01: batches as a picture, the law of the idle device, and their exercises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.patches import Rectangle

from .. import request, scheduler, timeline
from ..pictures.picture import COLORS, TEXT, Picture, figure
from .live import Sliders
from .parts import Case, Exercise


def explain_gaps(args: tuple[Any, ...], got: Any, want: list[tuple[int, float]]) -> str | None:
    """What is wrong with a list of gaps, in terms of the steps at hand; None where nothing can be told."""
    starts, ends = args
    try:
        found = {int(i): float(seconds) for i, seconds in got}
    except (TypeError, ValueError):
        return "Return a list of pairs, one for each gap: the number of the late step, and the seconds."
    if zero := next((i for i, seconds in found.items() if i > 0 and seconds <= 0), None):
        return f"Step {zero} starts just when step {zero - 1} ends: no time passes, so there is no gap before it."
    if 0 in found and dict(want) == {i: seconds for i, seconds in found.items() if i}:
        return "Step 0 has no step before it, so no gap either: begin with step 1."
    if want and found == {i - 1: seconds for i, seconds in want}:
        return "The seconds are right. Name the step that comes late, the one behind the gap."
    if want and found == {i: starts[i] - starts[i - 1] for i, _ in want}:
        return "That is from start to start, so the step itself is in it. A gap begins where the step before ends."
    late, seconds = next((pair for pair in want if pair[0] not in found), (None, 0.0))
    if late is not None:
        between = f"Step {late - 1} ends at {ends[late - 1]:g} and step {late} starts at {starts[late]:g}"
        return f"{between}: the device was idle for {seconds:g}, and your list does not say so."
    return None


# fmt: off
EXERCISES = {
    "idle_share": Exercise(
        timeline.idle_share, "With {0:g} ms of host work and a device step of {1:g} ms", "says",
        (
            Case((4.0, 4.0), "The device works for 4 ms of every 8 ms, so it is idle for half of the time.", (
                (1.0, "You divide the host's part by the device's. Divide it by the whole round."),
                (50.0, "Right, if it were in percent. A share is a number from 0 to 1."),
                (0.0, "// cuts everything after the point away. Divide with /."),
            )),
            Case((1.0, 3.0), "The whole round takes 1 + 3 = 4 ms, and the device waits for 1 ms of it.", (
                (0.75, "For that share of the time the device is active. For the rest it is idle."),
            )),
            Case((0.0, 5.0), "With no host work the device never waits."),
        ),
        (
            "One round of the synchronous loop is host work first, then the device step. How long is the round?",
            "The device waits exactly as long as the host works. Divide that by the length of the round.",
        ),
    ),
    "overlap_gain": Exercise(
        timeline.overlap_gain, "With {0:g} ms of host work and a device step of {1:g} ms", "says",
        (
            Case((2.0, 6.0), "Taking turns, a step costs 2 + 6 = 8 ms. Overlapped, the host's 2 ms fit beside the "
                 "device's 6, so a step costs 6: 8 / 6 times as fast.", (
                     (0.75, "Turned over: in 0.75 of the time. As many tokens in less time is a factor above 1."),
                     (0.25, "That is the share that was idle. Ask how long a step takes before and after."),
                     (1 / 3, "A third more is right, as a gain; as a factor it is 1 more than that."),
                     (4.0, "You divide by the shorter time. Overlapped, a step ends when the longer one ends."),
                 )),
            Case((5.0, 5.0), "10 ms before, 5 ms after: twice as fast. More than that is never to be had."),
            Case((6.0, 2.0), "Now the host is the slower one: a step takes its 6 ms, and the device waits for it.", (
                (4.0, "You divide by the device's time always. Here the host needs longer: a step takes 6 ms, not 2."),
            )),
            Case((0.0, 5.0), "No host work, nothing to hide: as fast as before, a factor of 1."),
        ),
        (
            "How long does a step take when host and device take turns? How long when both work at the same time?",
            "Before: the sum of both. After: the longer of the two, `max(host_s, device_s)`. Divide before by after.",
        ),
    ),
    "idle_gaps": Exercise(
        timeline.idle_gaps, "For steps that start at {0} and end at {1}", "finds",
        (
            Case(([0, 6], [5, 10]), "Step 0 ends at 5, step 1 starts at 6: one gap of 1 before step 1."),
            Case(([0, 5, 12], [5, 10, 15]), "Step 1 starts just when step 0 ends, step 2 comes 2 late."),
            Case(([0, 6, 12, 18], [5, 12, 15, 20]), "There are two gaps here: before step 1 and before step 3."),
            Case(([0, 4, 8], [4, 8, 12]), "An asynchronous loop: no gap at all, an empty list."),
            Case(([3, 9], [5, 11]), "Only the time between two steps counts. This clock did not start at 0."),
            Case(([3], [5]), "One step alone has no gap before it."),
        ),
        (
            "Go through the steps from the second one on. Compare the start of each with the end of the one before.",
            "For `i` in `range(1, len(starts))`, if `starts[i] > ends[i - 1]`: append `(i, starts[i] - ends[i - 1])`.",
        ),
        explain=explain_gaps,
        picture=lambda args, got, want: draw_gaps(args[0], args[1], got),
    ),
    "finish_reason": Exercise(
        request.finish_reason, "For the tokens {0}, a limit of {1} and the stop tokens {2}", "says",
        (
            Case(([7, 8], 4, (2,)), "Two tokens of at most four, and no stop token: this request goes on."),
            Case(([7, 8, 9, 6], 4, (2,)), "Four tokens are written and four were allowed: the limit is reached."),
            Case(([7, 2], 4, (2,)), "The last token is a stop token: the model has said that it is done."),
            Case(([7, 8, 9, 2], 4, (2,)), "Both are true at once. The model ended its text itself, so nothing was cut "
                 "off: \"stop\" wins, and the caller knows that the text is complete."),
            Case(([7, 5], 4, (2, 5)), "A model may have several stop tokens, and any of them ends the request."),
            Case(([7, 8, 2, 9], 8, ()), "The caller gave no stop tokens, so no token may end this request."),
            Case(([], 4, (2,)), "A request that has not written anything yet has no last token; it goes on."),
        ),
        (
            "Two questions, in this order: is the newest token a stop token? Are as many tokens written as allowed?",
            "`token_ids[-1]` is the newest token, and an empty list has none. Ask about the stop token first: it wins.",
        ),
    ),
    "fit_budget": Exercise(
        scheduler.fit_budget, "With waiting chunks {0}, room for {1} requests and a budget of {2} tokens", "admitted",
        (
            Case(([10, 10], 4, 64), "Both chunks fit into the budget and into the free rows, so both go.", (
                (20, "20 is a number of tokens. Count chunks: each is one request that joins."),
            )),
            Case(([20, 20, 20], 2, 64), "Tokens are left in the budget, but each request needs a row of its own and no "
                 "third row is free."),
            Case(([40, 20, 10], 4, 64), "40 + 20 = 60 tokens; a third chunk would make 70, more than the budget."),
            Case(([40, 24, 1], 4, 64), "40 + 24 is exactly the budget, and a budget may be used up."),
            Case(([40, 30, 10], 4, 64), "The second chunk does not fit. The third would, but it came later: first "
                 "come, first served. If short prompts could always overtake, a long one might wait for ever."),
            Case(([], 4, 64), "Nobody is waiting, so nobody is admitted."),
            Case(([10], 0, 64), "No row is free, so nobody can join, however small the chunk."),
        ),
        (
            "Walk along the waiting chunks from the front and keep a running total. Two things can stop you.",
            "Before you count a chunk, ask: is a row left (`count < free_rows`), and is `total + chunk <= budget`? At "
            "the first no, stop: `break`, not `continue`.",
        ),
        picture=lambda args, got, want: draw_budget(args[0], args[1], args[2], got),
    ),
    "device_activity": Exercise(
        timeline.device_activity, "For steps that start at {0} and end at {1}", "says",
        (
            Case(([0.0, 10.0], [6.0, 16.0]), "The second step's period runs from the end of the first (6) to its own "
                 "end (16): 10, and it computes for 6 of them. The first step has none before it and does not count.", (
                     ((12.0, 16.0), "You count the first step too. It has no step before it and so no period: leave it "
                      "out of both sums."),
                     ((6.0, 16.0), "Active is right. Your period begins at 0, where the first step starts; let it "
                      "begin where that step ends, at 6."),
                     (0.6, "That is the share. Return both sums, (active, period), and the caller can divide."),
                 )),
            Case(([0.0, 10.0, 18.0], [6.0, 16.0, 26.0]), "Add up all steps but the first: 6 + 8 active in periods of "
                 "10 + 10. Each step has its own length."),
            Case(([5.0, 9.0], [9.0, 12.0]), "The steps follow each other without a gap, so active and period are "
                 "equal. Only differences of times count: this clock did not start at 0."),
            Case(([0.0], [4.0]), "One step alone has no period, so there is nothing to add up yet: both are 0."),
        ),
        (
            "Leave step 0 out of both sums, but use its end: there the period of step 1 begins.",
            "Active is the sum of `ends[i] - starts[i]`. The periods are `ends[i] - ends[i - 1]`; added up, only the "
            "last end minus the first one is left.",
        ),
    ),
}
# fmt: on


REQUEST_COLORS = ("sky", "orange", "green", "yellow", "blue", "purple", "vermillion")


def draw_batches(batches: dict[str, Sequence[Sequence[int | None]]]) -> Picture:
    """Batches below each other on one axis of steps. `batches[title][row][step]` is the number of the request that this
    row computes in this step, or None: a wasted place, hatched."""
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
    """What a step costs, and what a token costs, over the rows of the batch: `cost` is rows -> milliseconds a step."""
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
    axes.set(xlabel="rows in the batch", ylabel="ms", ylim=(0, 1.15 * max(cost.values())), xlim=(-0.3, len(cost) - 0.4))
    axes.set_xticks(places, [str(rows) for rows in cost])
    picture.title = f"cost of a step and of a token, {min(cost)} to {max(cost)} rows"
    return picture


def draw_budget(chunk_sizes: Sequence[int], free_rows: int, budget: int, admitted: int) -> Picture:
    """Waiting chunks along an axis of tokens: the first `admitted` join the step, the others (hatched) wait."""
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
    """The steps of a device as numbered blocks, and below each but the first its period, with active and idle parts."""
    picture = figure(8, 1.7)
    axes: Any = picture.axes
    _draw_steps(axes, starts, ends)
    for number in range(1, len(starts)):
        before, end = ends[number - 1], ends[number]
        arrow = {"arrowstyle": "<->", "color": TEXT, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", (before, 1.3), (end, 1.3), arrowprops=arrow)
        active = f"period {end - before:g}, active {end - starts[number]:g}"
        axes.text((before + end) / 2, 1.8, active, ha="center", va="center", fontsize=9)
    axes.set(xlim=(min(starts[0], 0), ends[-1]), ylim=(2.2, -0.1), xlabel="time")
    axes.set_yticks([0.45, 1.3], ["compute", "periods"])
    picture.title = f"{len(starts)} steps and {len(starts) - 1} periods"
    return picture


def draw_gaps(starts: Sequence[float], ends: Sequence[float], found: Sequence[tuple[int, float]]) -> Picture:
    """The steps of a device as numbered blocks, and below them the gaps that somebody `found`, as pairs of `idle_gaps`:
    each as long as it was said to be, ending where its step begins."""
    picture = figure(8, 1.6)
    axes: Any = picture.axes
    red = COLORS["vermillion"]
    _draw_steps(axes, starts, ends)
    for number, seconds in found:
        axes.add_patch(
            Rectangle((starts[number] - seconds, 1), seconds, 0.9, facecolor="#FBE9DF", edgecolor=red, hatch="///")
        )
        axes.text(starts[number] - seconds / 2, 2.2, f"{seconds:g}", ha="center", va="center", fontsize=9)
    axes.set(xlim=(min(starts[0], 0), ends[-1]), ylim=(2.6, -0.1), xlabel="time")
    axes.set_yticks([0.45, 1.45], ["compute", "gaps found"])
    picture.title = f"{len(starts)} steps, {len(found)} gaps found"
    return picture


def _draw_steps(axes: Any, starts: Sequence[float], ends: Sequence[float]) -> None:
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        block = Rectangle((start, 0), end - start, 0.9, facecolor=COLORS["blue"], edgecolor="white")
        axes.add_patch(block)
        axes.text((start + end) / 2, 0.45, f"step {number}", ha="center", va="center", color="white", fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.spines[["left"]].set_visible(False)


class Recorded(NamedTuple):
    """A server that somebody measured: milliseconds of a step in both loops, and the idle share in the synchronous."""

    label: str
    sync_ms: float
    async_ms: float
    idle: float

    @property
    def host_ms(self) -> float:
        return self.sync_ms - self.async_ms


# Batches of 32 on one H200. The first: Hugging Face, "Unlocking asynchronicity in continuous batching" (2026-05), 300.6
# and 234.5 s for about 8192 steps. The others: this project, 2026-11, transformers 5.23 `generate_batch`, CUDA graphs;
# long texts have 8192 new tokens, short ones 512.
RECORDED = (
    Recorded("8B, long texts, published by Hugging Face", 300.6e3 / 8192, 234.5e3 / 8192, 0.240),
    Recorded("8B, long texts, transformers 5.23", 118.8e3 / 8192, 106.1e3 / 8192, 0.105),
    Recorded("8B, short texts, transformers 5.23", 11.0, 9.08, 0.169),
    Recorded("0.6B, short texts, transformers 5.23", 5.71, 4.42, 0.220),
    Recorded("1B, short texts, transformers 5.23", 4.79, 3.03, 0.356),
)


class Law(Sliders):
    """A picture of a law, with a star for one server whose host's and device's milliseconds a step are two sliders in a
    notebook. A subclass draws, moves its star in `_update`, and calls `_settle` when all is drawn."""

    controls = (("host_ms", "host, ms", 0.1, 20.0, 0.1), ("device_ms", "device, ms", 0.5, 100.0, 0.1))
    host_ms: float
    device_ms: float

    def _settle(self) -> None:
        self._update()
        self.figure.draw_without_rendering()
        self.figure.set_layout_engine("none")  # laid out once: redrawing then takes half the time


class IdleLaw(Law):
    """Idle share over the device's time for a step, with measured servers on it and one to play with."""

    def __init__(self, host_ms: float, device_ms: float) -> None:
        picture = figure(8, 4, "Idle share of the synchronous loop = host / (host + device)")
        super().__init__(picture.figure, "idle share over device time", picture.axes)
        self.host_ms, self.device_ms = host_ms, device_ms
        axes: Any = picture.axes
        self._axes = axes
        blue, orange, red = COLORS["blue"], COLORS["orange"], COLORS["vermillion"]
        for ms in (0.5, 2.0, 8.0):
            axes.plot(*self._law(ms), "--", color="#999999", linewidth=1)
            paper = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            where = {"ha": "center", "va": "center", "zorder": 4, "bbox": paper}
            axes.text(0.8, 100 * timeline.idle_share(ms, 0.8), f"host {ms:g} ms", fontsize=8, **where)
        for letter, run in zip("ABCDE", RECORDED, strict=True):
            x, y = run.async_ms, 100 * run.idle
            axes.plot(x, y, "o", markersize=13, color=orange, label=f"{letter}  {run.label}", zorder=4)
            axes.text(x, y, letter, ha="center", va="center", fontsize=9, zorder=5)
        (self._curve,) = axes.plot([], [], color=blue, linewidth=2.5, zorder=3)
        (self._star,) = axes.plot([], [], "*", markersize=16, color=red, markeredgecolor="black", zorder=6)
        axes.set(xscale="log", xlim=(0.5, 100), ylim=(0, 100), xlabel="device time of a step, ms", ylabel="idle, %")
        axes.set_xticks([0.5, 1, 2, 5, 10, 20, 50, 100], ["0.5", "1", "2", "5", "10", "20", "50", "100"])
        axes.minorticks_off()
        self._settle()

    @property
    def idle(self) -> float:
        """The idle share of the server to play with, from 0 to 1."""
        return timeline.idle_share(self.host_ms, self.device_ms)

    def _law(self, host_ms: float) -> tuple[list[float], list[float]]:
        x = [0.5 * 200 ** (i / 100) for i in range(101)]  # 0.5 to 100 ms, evenly on a log axis
        return x, [100 * timeline.idle_share(host_ms, device_ms) for device_ms in x]

    def _update(self) -> None:
        self._curve.set_data(*self._law(self.host_ms))
        self._star.set_data([self.device_ms], [100 * self.idle])
        self._star.set_label(f"host {self.host_ms:g} ms, device {self.device_ms:g} ms: idle {100 * self.idle:.0f} %")
        self._axes.legend(loc="upper right", fontsize=8, markerscale=0.6)


class GainLaw(Law):
    """How many times as fast the asynchronous loop is, over host / device, with one server to play with. `runs` are
    measured ones: label -> (host's ms, device's ms, times as fast)."""

    def __init__(self, runs: dict[str, tuple[float, float, float]], host_ms: float, device_ms: float) -> None:
        picture = figure(8, 4, "The most that overlapping can bring = (host + device) / the longer of the two")
        super().__init__(picture.figure, "gain over host / device", picture.axes)
        self.host_ms, self.device_ms = host_ms, device_ms
        axes: Any = picture.axes
        self._axes = axes
        ratios = [0.0005 * 100000 ** (i / 200) for i in range(201)]  # 0.0005 to 50, evenly on a log axis
        axes.plot(ratios, [timeline.overlap_gain(ratio, 1) for ratio in ratios], color=COLORS["blue"], linewidth=2.5)
        axes.axvline(1, color="#999999", linestyle="--", linewidth=1)
        for x, side, words in (
            (0.85, "right", "device slower:\nall host work hides"),
            (1.2, "left", "host slower:\ndevice waits"),
        ):
            axes.text(x, 0.63, words, ha=side, va="bottom", fontsize=9)
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
            xscale="log", xlim=(0.0005, 50), ylim=(0.6, 2.15), xlabel="host work / device step", ylabel="times as fast"
        )
        axes.set_xticks([0.001, 0.01, 0.1, 1, 10], ["0.001", "0.01", "0.1", "1", "10"])
        axes.minorticks_off()
        self._settle()

    @property
    def gain(self) -> float:
        """What overlapping can bring the server to play with: 1 to 2."""
        return timeline.overlap_gain(self.host_ms, self.device_ms)

    def _update(self) -> None:
        self._star.set_data([self.host_ms / self.device_ms], [self.gain])
        self._star.set_label(f"host {self.host_ms:g} ms, device {self.device_ms:g} ms: {self.gain:.2f} times")
        self._axes.legend(loc="upper left", fontsize=8, markerscale=0.6)
