"""Notebooks 00 and 01: batches as a picture, the law of the idle device, and their exercises."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import Rectangle
from PIL import Image

from .. import plot, request, scheduler, timeline
from .parts import Case, Exercise, slider, with_widget

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


def draw_batches(batches: dict[str, Sequence[Sequence[int | None]]]) -> plot.Picture:
    """Batches below each other on one axis of steps. `batches[title][row][step]` is the number of the request that this
    row computes in this step, or None: a wasted place, hatched."""
    steps = max(len(row) for rows in batches.values() for row in rows)
    picture = plot.figure(8, 0.5 + 0.3 * sum(len(rows) + 2 for rows in batches.values()))
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
    axes.add_patch(Rectangle((step, row), 1, 1, facecolor=plot.COLORS[color], edgecolor="white", linewidth=1.5))
    axes.text(step + 0.5, row + 0.5, str(place), ha="center", va="center", color=ink, fontsize=9)


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


class IdleLaw(plot.Picture):
    """Idle share over the device's time for a step, with measured servers on it and one to play with: its host's and
    its device's milliseconds a step are two sliders in a notebook."""

    def __init__(self, host_ms: float, device_ms: float) -> None:
        picture = plot.figure(8, 4, "Idle share of the synchronous loop = host / (host + device)")
        super().__init__(picture.figure, "idle share over device time", picture.axes)
        self.host_ms, self.device_ms = host_ms, device_ms
        axes: Any = picture.axes
        self._axes = axes
        blue, orange, red = plot.COLORS["blue"], plot.COLORS["orange"], plot.COLORS["vermillion"]
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
        self._update()
        self.figure.draw_without_rendering()
        self.figure.set_layout_engine("none")  # laid out once: redrawing then takes half the time

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

    def _live_png(self) -> bytes:
        """As `png`, but large and soon done: it follows a slider."""
        canvas, file = FigureCanvasAgg(self.figure), io.BytesIO()
        canvas.draw()
        Image.fromarray(np.asarray(canvas.buffer_rgba())).save(file, "png", compress_level=1)
        return file.getvalue()

    @cached_property
    def widget(self) -> Any:
        """Two sliders, each with a box to type into, above the picture."""
        import ipywidgets

        image = ipywidgets.Image(value=self._live_png(), format="png", layout=ipywidgets.Layout(max_width="100%"))

        def control(name: str, label: str, lowest: float, highest: float) -> Any:
            def moved(value: float) -> None:
                setattr(self, name, value)
                self._update()
                image.value = self._live_png()

            return slider(label, getattr(self, name), lowest, highest, moved)

        host, device = control("host_ms", "host, ms", 0.1, 20.0), control("device_ms", "device, ms", 0.5, 100.0)
        return ipywidgets.VBox([host, device, image])

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return with_widget(self, super()._repr_mimebundle_())
