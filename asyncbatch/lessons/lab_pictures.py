"""Notebook 02: what happened in a lab, as a picture: `draw({"in order": lab})`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Patch, Rectangle
from matplotlib.patheffects import withStroke

from ..pictures.picture import COLORS, Picture
from ..timeline import LANES
from .lab import COMMANDS, Call, Lab

LOOKS = {  # colour of the box, colour of its text, words
    "fill": (COLORS["orange"], "black", "fill"),
    "work": (COLORS["orange"], "black", "other work"),
    "launch": ("#F8D999", "black", "launch"),
    "synchronize": ("#EEEEEE", "#444444", "wait"),
    "copy_in": (COLORS["sky"], "black", "copy in"),
    "step": (COLORS["blue"], "white", "step"),
    "copy_out": (COLORS["green"], "white", "copy out"),
}
LEGEND = {"host works": "fill", "host launches": "launch", "host waits": "synchronize"} | {
    LOOKS[command][2]: command for command in COMMANDS
}
WIDTH, LEFT, ROW = 10.0, 0.85, 0.27  # inches
LAB_ROWS = 6.0  # rows of one lab
DOTS = {"hatch": "....", "edgecolor": "#C4C4C4"}  # waiting


def draw(labs: Mapping[str, Lab], right: Sequence[int] = ()) -> Picture:
    """What the host and the streams did in each lab, the labs above each other on one time axis. Arrows lead from the
    mark of an event to what waited for it.

    right: what should have been read from each slot. If given, the picture says of each read whether it is right."""
    height = ROW * LAB_ROWS * len(labs) + 0.75
    figure = Figure((WIDTH, height), facecolor="white")
    axes = figure.add_axes((LEFT / WIDTH, 0.7 / height, 1 - (LEFT + 0.15) / WIDTH, 1 - 0.72 / height))
    axes.spines[["left", "top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.set_xlabel("milliseconds since the host began", fontsize=8)
    end = max(lab.total_ms for lab in labs.values())
    axes.set(xlim=(-0.006 * end, 1.03 * end), ylim=(LAB_ROWS * len(labs) - 0.2, -0.1), yticks=[])
    looks = {words: DOTS if kind == "synchronize" else {"linewidth": 0} for words, kind in LEGEND.items()}
    patches = [Patch(facecolor=LOOKS[kind][0], label=words, **looks[words]) for words, kind in LEGEND.items()]  # type: ignore[arg-type]
    figure.legend(handles=patches, loc="lower center", ncols=len(patches), frameon=False, fontsize=8)
    captions = []
    for number, (name, lab) in enumerate(labs.items()):
        exact = lab.device.clock == "virtual"
        captions.append(f"{name}: {lab.total_ms:.4g} ms in all" if exact else name)
        what = f"{captions[-1]} (virtual clock)" if exact else f"{name} (measured, {lab.device.clock} clock)"
        _Lanes(axes, number * LAB_ROWS, end).draw(lab, what, right)
    return Picture(figure, "; ".join(captions), axes)


class _Lanes:
    """Draws the four lanes of one lab, from row `top` on. end: how many milliseconds the axis has."""

    def __init__(self, axes: Any, top: float, end: float):
        self.axes, self.top, self.end = axes, top, end

    def draw(self, lab: Lab, caption: str, right: Sequence[int]) -> None:
        origin, spans = lab.calls[0].start, lab.spans()
        first = self.top + (1.6 if any(call.kind == "read" for call in lab.calls) else 1.1)
        self.rows = {lane: first + number for number, lane in enumerate(LANES)}
        since = lambda seconds: 1e3 * (seconds - origin)  # noqa: E731
        self.text(0, self.top + 0.5, caption, ha="left", fontsize=10, fontweight="bold")
        for lane, y in self.rows.items():
            where = {"transform": self.axes.get_yaxis_transform(), "ha": "right", "va": "center", "fontsize": 9}
            self.axes.text(-0.012, y + 0.5, lane, **where)
            self.axes.axhline(y + 0.5, color="#DDDDDD", linewidth=0.6, zorder=0)
        for (command, slot), (lane, start, end) in spans.items():
            self.box(since(start), since(end), lane, command, f"{LOOKS[command][2]} {slot}")
        for call in lab.calls:
            if call.kind == "read":
                self.read(since(call.start), call, right)
            elif call.kind in LOOKS:
                label = f"fill {call.slot}" if call.kind == "fill" else LOOKS[call.kind][2]
                self.box(since(call.start), since(call.end), "host", call.kind, label)
        for (lane, start), (other, end) in _wait_arrows(lab, spans):
            self.arrow((since(start), lane), (since(end), other))

    def text(self, x: float, y: float, text: str, **options: Any) -> None:
        look = {"ha": "center", "va": "center", "fontsize": 8, "parse_math": False, "zorder": 6}
        self.axes.text(x, y, text, **{**look, **options})

    def box(self, start: float, end: float, lane: str, kind: str, label: str) -> None:
        """A box from start to end with its label, or only the label's last word, or nothing: whatever fits."""
        face, ink, _ = LOOKS[kind]
        width = max(end - start, 0.0015 * self.end)
        edge = DOTS if kind == "synchronize" else {"edgecolor": "white"}
        box = Rectangle((start, self.rows[lane] + 0.1), width, 0.8, facecolor=face, linewidth=0.6, **edge)
        self.axes.add_artist(box)  # faster than add_patch, which updates the limits of the axes each time
        room = (WIDTH - LEFT) * 72 * width / self.end  # points
        texts = [label, label.split()[-1]] if lane != "host" else [label]
        if text := next((text for text in texts if room > 4.6 * len(text) + 3), ""):
            rim = {"path_effects": [withStroke(linewidth=2.5, foreground=face)]} if kind == "synchronize" else {}
            self.text(start + width / 2, self.rows[lane] + 0.5, text, color=ink, **rim)

    def read(self, moment: float, call: Call, right: Sequence[int]) -> None:
        verdict, look = "", {}
        if right and call.slot is not None:
            verdict = " right" if call.what == right[call.slot] else " WRONG"
        if verdict == " WRONG":
            look = {"color": COLORS["vermillion"], "fontweight": "bold"}
        # The texts of reads that are close together stand at two heights.
        near = abs(moment - getattr(self, "last_read", -self.end)) < 0.08 * self.end and not getattr(self, "up", False)
        self.last_read, self.up = moment, near
        y = self.rows["host"] - (0.62 if near else 0.22)
        self.text(moment, y, f"{call.what}{verdict}", fontsize=7.5, **look)
        self.axes.plot([moment], [self.rows["host"] + 0.12], "v", markersize=4, color="black", zorder=6)

    def arrow(self, start: tuple[float, str], end: tuple[float, str]) -> None:
        points = [(moment, self.rows[lane] + 0.5) for moment, lane in (start, end)]
        look = {"arrowstyle": "-|>", "mutation_scale": 8, "shrinkA": 0, "shrinkB": 0, "linewidth": 1.1, "zorder": 5}
        self.axes.add_artist(FancyArrowPatch(*points, color="black", **look))


def _wait_arrows(lab: Lab, spans: Mapping) -> list[tuple[tuple[str, float], tuple[str, float]]]:
    """An arrow for each wait of a lane for another lane's event: from the end of the work before the event's mark to
    the start of what waited, both as (lane, seconds)."""
    newest: dict[str, float] = {}  # for each lane, the end of what was launched last
    marks: dict[Any, tuple[str, float]] = {}
    waiting: dict[str, list[tuple[str, float]]] = {lane: [] for lane in LANES}
    arrows = []
    for call in lab.calls:
        if call.kind == "launch":
            _, start, newest[call.lane] = spans[call.what, call.slot]
            arrows += [(mark, (call.lane, start)) for mark in waiting[call.lane]]
            waiting[call.lane] = []
        elif call.kind == "record" and call.lane in newest:
            marks[call.what] = call.lane, newest[call.lane]
        elif call.kind == "wait" and call.what in marks and marks[call.what][0] != call.lane:
            waiting[call.lane].append(marks[call.what])
        elif call.kind == "synchronize" and call.what in marks:
            arrows.append((marks[call.what], ("host", call.end)))
    return arrows
