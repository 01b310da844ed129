"""Timelines as a picture; in a notebook one that can be zoomed and dragged, and that explains what is under the mouse.

`plot(sync, async_)` draws timelines above each other on one time axis, where each begins at 0. If spans are too small
to draw one by one, each pixel column is filled up to the share of its time that was busy. So the filled area of a lane
is its busy time, whatever the zoom.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch, Patch, Rectangle, StepPatch
from matplotlib.patheffects import withStroke

from ..timeline import LANES, Timeline, busy_curve
from .picture import COLORS, DPI, GRID, TEXT, Picture, drawable, plain_axes

WORDS = {"host": "host", "H2D": "H2D (copy in)", "compute": "compute", "D2H": "D2H (copy out)"}
WIDGET = Path(__file__).with_name("static") / "timeline.js"
# Rows of a lane. The host's is so tall that UPRIGHT characters can stand upright in a block too narrow for them.
HEIGHTS = {"host": 2.0, "H2D": 0.5, "compute": 1.0, "D2H": 0.5}
UPRIGHT = 8
HEADING, PAUSE = 0.95, 0.3  # rows above a timeline's lanes for its caption, and between two lanes
Look = tuple[str, str, str, str, str]  # of a layer: (lane, face colour, text colour, hatch, legend)
# The layers of the lanes, in the order of stacking.
LAYERS: dict[str, Look] = {
    "work": ("host", COLORS["orange"], "black", "", "host works"),
    "wait": ("host", "#EEEEEE", "#444444", "....", "host waits"),
    "in": ("H2D", COLORS["sky"], "black", "", "copy in"),
    "decode": ("compute", COLORS["blue"], "white", "", "step"),
    "prefill": ("compute", COLORS["blue"], "white", "///", "step with prefill"),
    "out": ("D2H", COLORS["green"], "white", "", "copy out"),
}
IDLE = ("#FBE9DF", COLORS["vermillion"], "\\\\\\\\")  # face colour, hatch colour, hatch
HATCH = {"wait": "#C4C4C4", "prefill": "#FFFFFF", "moves": "#FFFFFF", "held": "#555555"}  # hatch colours
WIDTH, LEFT, RIGHT = 10.0, 1.15, 0.2  # inches
Spans = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # of a layer: names, steps, starts, ends
# From a timeline to (step, cause, share) for gaps that have one: the step before which the device was idle, what caused
# most of it, and the share of the gap (0 to 1) that this took.
Causes = Callable[[Timeline], Iterable[tuple[int, str, float]]]


def plot(*timelines: Timeline, title: str | None = None, window: tuple[float, float] | None = None,
         causes: Causes | None = None) -> TimelineFigure:  # fmt: skip
    """The timelines above each other on one time axis, where each begins at 0.

    window: the (start, end) in seconds to zoom in on; None takes two or three steps in the middle of the run, in which
    the host's blocks have room for their names.
    causes: what explains the gaps of a timeline to who points at them (see `Causes`); None for what the host was doing.
    Only spans on the lanes host, H2D, compute and D2H are drawn. Raises ValueError without a timeline, and for an empty
    window."""
    if not timelines or not all(isinstance(timeline, Timeline) for timeline in timelines):
        types = ", ".join(type(timeline).__name__ for timeline in timelines) or "nothing"
        raise ValueError(f"plot() wants one or more Timelines, as in plot(sync, async_), and was given: {types}")
    check_window(window)
    names = [one_line(timeline.label, 40) or f"run {i}" for i, timeline in enumerate(timelines, 1)]
    tracks = [Track(timeline, name) for timeline, name in zip(timelines, names, strict=True)]
    return TimelineFigure(tracks, title, window, causes or host_causes)


def check_window(window: tuple[float, float] | None) -> None:
    """ValueError for anything but None and two times of which the second is later."""
    if window is not None and not (len(window) == 2 and window[0] < window[1]):
        raise ValueError(f"window is (start, end) in seconds with start < end, not {window!r}")


def host_causes(timeline: Timeline) -> Iterator[tuple[int, str, float]]:
    """What the host did for most of each gap before a decode step. Waiting is nothing that it did."""
    for gap in timeline.gaps():
        did = {name: seconds for name, seconds in gap.host_s.items() if name != "wait"}
        if did:
            name = max(did, key=lambda one: did[one])
            yield gap.step, name, did[name] / gap.seconds


class TimelineFigure(Picture):
    """What `plot` returns: a PNG, and in a notebook with anywidget an interactive view. All tracks have the same
    lanes."""

    def __init__(self, tracks: Sequence[Track], title: str | None, window: tuple[float, float] | None,
                 causes: Causes):  # fmt: skip
        self.causes = causes
        self.tracks = list(tracks)
        self.end = max(track.end for track in self.tracks) or 1.0
        self.window = _default_window(self.tracks, self.end)
        if window is not None:
            start, end = max(0.0, window[0]), min(self.end, window[1])
            if start >= end:
                raise ValueError(f"window {window!r} lies outside the run, which is 0 to {self.end:.6g} seconds long")
            self.window = (start, end)
        title = one_line(title or "", 90)
        names = ", ".join(track.name for track in self.tracks)
        super().__init__(_draw(self.tracks, title, self.window, self.end), title or names)

    @property
    def num_spans(self) -> int:
        """How many spans the lanes have."""
        return sum(len(steps) for track in self.tracks for _, steps, _, _ in track.layers.values())

    def packed(self, most: int | None = None) -> tuple[dict[str, Any], bytes]:
        """What static/timeline.js draws, in a notebook and on the page of a report: a dict, and the spans as bytes, 24
        for each.

        most: how many spans there are at most (None: all). `about["lanes"]` then says for each lane from when to when
        its spans are included ("kept", in seconds; None if all are). The rest is drawn as left out."""
        middle = sum(self.window) / 2
        reach = _reach(self.tracks, middle, self.num_spans if most is None else most)
        spans, names = _pack(self.tracks, middle, reach)
        looks, of_tracks = self.tracks[0].looks, self.tracks[0].lanes
        causes, gaps = _pack_causes([self.causes(track.timeline) for track in self.tracks])
        tracks = [
            {"name": track.name, "caption": track.caption, "end": track.end, "gaps": each}
            for track, each in zip(self.tracks, gaps, strict=True)
        ]
        layers = [
            {"key": key, "lane": of_tracks.index(lane), "face": face, "text": text}
            | {"line": HATCH.get(key), "hatch": hatch[:1], "words": words}
            for key, (lane, face, text, hatch, words) in looks.items()
        ]
        lanes = []
        for lane in of_tracks:
            stretch = [max(0.0, middle - reach[lane]), min(self.end, middle + reach[lane])]
            limits = None if math.isinf(reach[lane]) else stretch
            lanes.append({"lane": lane, "words": WORDS[lane], "height": HEIGHTS[lane], "kept": limits})
        about = {
            "title": self.title,
            "tracks": tracks,
            "lanes": lanes,
            "layers": layers,
            "idle": {"face": IDLE[0], "line": IDLE[1]},
            "names": names,
            "causes": causes,
            "window": list(self.window),
            "end": self.end,
        }
        return about, spans

    @cached_property
    def widget(self):
        """The interactive view (an anywidget), or None if anywidget or ipywidgets is not installed."""
        if not (find_spec("anywidget") and find_spec("ipywidgets")):
            return None
        about, spans = self.packed()
        return _widget_class()(about=about, spans=spans)

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict:
        bundle = super()._repr_mimebundle_()
        if self.widget is not None:
            view = {"version_major": 2, "version_minor": 0, "model_id": self.widget.model_id}
            bundle["application/vnd.jupyter.widget-view+json"] = view
        return bundle


@cache
def _widget_class():
    import anywidget
    import traitlets

    class TimelineWidget(anywidget.AnyWidget):
        _esm = WIDGET.read_text(encoding="utf-8")
        about = traitlets.Dict().tag(sync=True)
        spans = traitlets.Bytes().tag(sync=True)

    return TimelineWidget


def one_line(text: str, longest: int) -> str:
    """The text without line breaks, cut to so many characters."""
    text = drawable(" ".join(text.split()))
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _unit(seconds: float) -> tuple[float, str]:
    """The unit in which to write times of a range this long, as (factor from seconds, name)."""
    return next(((f, name) for f, name in ((1.0, "s"), (1e3, "ms")) if seconds * f >= 2), (1e6, "µs"))


class Track:
    """One timeline, ready to draw. layers: for each layer (names, steps, starts, ends), in seconds from `origin`, by
    default the timeline's own beginning. A subclass may draw other lanes, and other layers (`looks`) on them."""

    lanes: tuple[str, ...] = LANES
    looks: dict[str, Look] = LAYERS

    def __init__(self, timeline: Timeline, name: str, origin: float | None = None):
        self.timeline, self.name = timeline, name
        self.origin = origin = timeline.origin if origin is None else origin
        summary = timeline.summary()
        self.end = max((span.end for span in timeline.spans), default=origin) - origin
        lanes = {lane: timeline.lane(lane) for lane in self.lanes}
        prefill = np.array([step.step for step in timeline.steps if step.kind == "prefill"], np.int64)
        is_wait = np.array([span_name == "wait" for span_name in lanes["host"][0]], bool)
        is_prefill = np.isin(lanes["compute"][1], prefill)
        masks = {"work": ~is_wait, "wait": is_wait, "decode": ~is_prefill, "prefill": is_prefill}
        self.layers: dict[str, Spans] = {}
        for key, (lane, *_) in self.looks.items():
            names, steps, starts, ends = lanes[lane]
            mask = masks.get(key, np.ones(len(steps), bool))
            names = np.array(names, object)[mask]
            self.layers[key] = (names, steps[mask], starts[mask] - origin, ends[mask] - origin)
        self.steps = lanes["compute"][2] - origin, lanes["compute"][3] - origin
        factor, unit = _unit(2 * self.end)  # seconds from 1 s on: a single number needs less room than an axis
        parts = [f"{self.end * factor:.4g} {unit} in all", one_line(f"{timeline.clock} clock", 60)]
        if not math.isnan(summary.idle):
            parts = [f"device active {100 * summary.device_active:.1f} %", f"idle {100 * summary.idle:.1f} %", *parts]
        self.caption = ", ".join(parts) + timeline.cut if timeline.spans else "no spans"


def _away(starts: np.ndarray, ends: np.ndarray, time: float) -> np.ndarray:
    """How far (seconds) each span is from a point in time: 0 if the point is inside it."""
    return np.maximum(0, np.maximum(starts - time, time - ends))


def _reach(tracks: list[Track], middle: float, most: int) -> dict[str, float]:
    """For each lane, how far from `middle` (seconds) its spans can be included if there may be `most` spans in all; inf
    means that all of them are.

    All steps of the device are included if these are no more than four fifths of `most`: between them are the idle
    gaps, which are the reason to look at a timeline."""
    lanes = tracks[0].lanes
    parts: dict[str, list[np.ndarray]] = {lane: [] for lane in lanes}
    for track in tracks:
        for key, (_, _, starts, ends) in track.layers.items():
            parts[track.looks[key][0]].append(_away(starts, ends, middle))
    away = {lane: np.concatenate(of_lane) for lane, of_lane in parts.items()}
    cut, room = list(lanes), most
    if len(away["compute"]) <= 0.8 * most:
        cut.remove("compute")
        room -= len(away["compute"])
    ordered = np.sort(np.concatenate([away[lane] for lane in cut]))
    reach = float(ordered[room]) if len(ordered) > room else math.inf
    return {lane: reach if lane in cut else math.inf for lane in lanes}


def _pack(tracks: list[Track], middle: float, reach: dict[str, float]) -> tuple[bytes, list[str]]:
    """The spans nearer to `middle` than the `reach` of their lane, as bytes, 24 for each, and the list of names that
    they point into."""
    layout = np.dtype([("start", "<f8"), ("end", "<f8"), ("step", "<i4"), ("name", "<u2"), ("layer", "<u2")])
    parts, number = [], {}
    for i, track in enumerate(tracks):
        for j, (key, layer) in enumerate(track.layers.items()):
            near = _away(*layer[2:], middle) < reach[track.looks[key][0]]
            names, steps, starts, ends = (column[near] for column in layer)
            part = np.zeros(len(steps), layout)
            part["start"], part["end"], part["step"] = starts, ends, steps
            part["name"] = [number.setdefault(name, len(number)) for name in names]
            part["layer"] = i * len(track.looks) + j
            parts.append(part)
    return np.concatenate(parts).tobytes(), list(number)


def _pack_causes(of_tracks: Iterable[Iterable[tuple[int, str, float]]]) -> tuple[list[str], list[dict[str, Any]]]:
    """The causes of all gaps, and for each track the gaps that have one: step, place among the causes, per cent."""
    number: dict[str, int] = {}
    tracks = []
    for gaps in of_tracks:
        rows = [(step, number.setdefault(cause, len(number)), round(100 * share)) for step, cause, share in gaps]
        columns = zip(*rows, strict=True) if rows else ((), (), ())
        tracks.append(dict(zip(("steps", "causes", "percent"), map(list, columns), strict=True)))
    return list(number), tracks


def _default_window(tracks: list[Track], end: float) -> tuple[float, float]:
    """Two or three steps in the middle of the shortest run, from shortly before a step of the first one on. A run of
    fewer than five steps is shown whole."""
    starts, ends = tracks[0].steps
    if len(ends) < 5:
        return 0.0, end
    length = 2.5 * float(np.median(np.diff(ends)))
    middle = min(track.end for track in tracks if track.end > 0) / 2
    begin = float(starts[max(0, np.searchsorted(starts, middle - length / 2) - 1)]) - 0.02 * length
    return max(0.0, begin), min(end, max(0.0, begin) + length)


def label(lane: str, name: str, step: int, room: float) -> tuple[str, int]:
    """What stands in a block that is `room` pixels wide, and by how many degrees it is turned; "" where nothing fits.

    On the host's lane "plan 6", upright where that is too wide, and without the number where that is too tall. On the
    compute lane "step 5" or "5", and a name that is not "step" without the number."""
    if lane == "compute":
        texts = (f"step {step}", str(step)) if name == "step" else (name,)
        return next((text for text in texts if room > 9 * len(text) + 4), ""), 0
    text = f"{name} {step}"
    if room > 9 * len(text) + 4:
        return text, 0
    return next(((text, 90) for text in (text, name) if room > 13 and len(text) <= UPRIGHT), ("", 0))


def _draw(tracks: list[Track], title: str, window: tuple[float, float], end: float) -> Figure:
    lanes, layers = tracks[0].lanes, tracks[0].looks
    rows = sum(HEIGHTS[lane] for lane in lanes) + PAUSE * len(lanes) + HEADING
    zoomed = window != (0.0, end)
    # Heights in inches, from the top: title, overview and the gap below it, the lanes, axis and legend.
    top, strip, gap = 0.34 if title else 0.1, 0.2 * len(tracks) if zoomed else 0.0, 0.5 if zoomed else 0.0
    body, foot = 0.27 * rows * len(tracks), 0.78
    height = top + strip + gap + body + foot
    fig = Figure((WIDTH, height), facecolor="white")
    if title:
        fig.text(0.15 / WIDTH, 1 - 0.24 / height, title, size=12, weight="bold", color=TEXT, parse_math=False)

    main = _Pane(fig, foot, body, window, rows * len(tracks))
    main.axes.set_xlabel(f"time since the run began ({main.unit})", size=8, color=TEXT)
    ticks = {}
    for i, track in enumerate(tracks):
        y = i * rows + HEADING
        name = main.text(window[0], y - 0.28, track.name, size=11, weight="bold", ha="left", va="baseline")
        about = {"xycoords": name, "textcoords": "offset points", "va": "bottom", "parse_math": False}
        main.axes.annotate(track.caption, (1, 0), (10, 0), size=9, color=TEXT, **about)
        for lane in lanes:
            main.lane(track, lane, y)
            ticks[y + HEIGHTS[lane] / 2] = WORDS[lane]
            y += HEIGHTS[lane] + PAUSE
    main.axes.set_yticks(list(ticks), list(ticks.values()))
    looks = [(face, HATCH.get(key), hatch, words) for key, (_, face, _, hatch, words) in layers.items()]
    keys = ("facecolor", "edgecolor", "hatch", "label")
    patches = [Patch(lw=0, **dict(zip(keys, look, strict=True))) for look in [*looks, (*IDLE, "device idle")]]
    fig.legend(handles=patches, loc="lower center", ncols=len(patches), frameon=False, fontsize=8, labelcolor=TEXT)
    if zoomed:
        over = _Pane(fig, foot + body + gap, strip, (0.0, end), len(tracks))
        for i, track in enumerate(tracks):
            over.idle(track, i + 0.12, 0.76)
            over.fill(track, [key for key in layers if layers[key][0] == "compute"], i + 0.12, 0.76)
        names = [one_line(track.name, 16) for track in tracks]
        over.axes.set_yticks([i + 0.5 for i in range(len(tracks))], names, parse_math=False)
        over.axes.set_xlabel(f"whole run ({over.unit})", size=8, color=TEXT, ha="right")
        over.axes.xaxis.set_label_coords(-0.018, -0.45 / len(tracks))
        (low, high), bottom = (x * over.factor for x in window), len(tracks)
        over.axes.add_patch(Rectangle((low, 0), high - low, bottom, fill=False, lw=1.2, ec=TEXT, clip_on=False))
        for x in window:
            ends = (x * over.factor, bottom), (x * main.factor, 0.1)
            line = ConnectionPatch(
                *ends, "data", "data", axesA=over.axes, axesB=main.axes, color="#999999", lw=0.8, ls=":"
            )
            fig.add_artist(line)
    return fig


class _Pane:
    """Axes with lanes. x is time: methods take seconds, and the axis is labelled in `unit`. y is rows, from the top."""

    def __init__(self, fig: Figure, bottom: float, tall: float, window: tuple[float, float], rows: float):
        height = fig.get_figheight()
        self.axes = fig.add_axes((LEFT / WIDTH, bottom / height, 1 - (LEFT + RIGHT) / WIDTH, tall / height))
        self.window = window
        self.factor, self.unit = _unit(window[1] - window[0])
        self.pixels = int((WIDTH - LEFT - RIGHT) * DPI)
        self.axes.set(xlim=(window[0] * self.factor, window[1] * self.factor), ylim=(rows, 0))
        plain_axes(self.axes)
        self.axes.spines["left"].set_visible(False)
        self.axes.tick_params(axis="y", length=0)

    def text(self, x: float, y: float, text: str, rim: str = "white", **options):
        """Plain text, centred at (x, y) unless `options` say otherwise. A thin rim makes it readable on a hatch."""
        options = {"size": 7.5, "color": TEXT, "ha": "center", "va": "center"} | options
        effects = [withStroke(linewidth=2, foreground=rim)]
        return self.axes.text(x * self.factor, y, drawable(text), parse_math=False, path_effects=effects, **options)

    def bars(self, starts, ends, y: float, tall: float, face: str, edge=None, hatch: str = "", lw: float = 0.0) -> None:
        """Rectangles from starts to ends (seconds), cut off at the edges of the window."""
        starts, ends = np.clip(starts, *self.window), np.clip(ends, *self.window)
        bars = np.column_stack([starts, ends - starts]) * self.factor
        self.axes.broken_barh(bars, (y, tall), facecolor=face, edgecolor=edge, hatch=hatch, lw=lw)

    def idle(self, track: Track, y: float, tall: float) -> None:
        """The band behind the compute lane, from its first step to its last. Where steps do not cover it, the device is
        idle."""
        starts, ends = track.steps
        if len(starts):
            self.bars(starts[:1], ends.max(keepdims=True), y, tall, *IDLE)

    def fill(self, track: Track, keys: Iterable[str], y: float, tall: float) -> None:
        """Fill each pixel column from the bottom: each layer takes the share of the column's time that it was busy."""
        edges = np.linspace(*self.window, self.pixels + 1)
        low = np.full(self.pixels, y + tall)
        for key in keys:
            busy = np.interp(edges, *busy_curve(*track.layers[key][2:]))
            high = low - tall * np.diff(busy) / np.diff(edges)
            look = {
                "facecolor": track.looks[key][1],
                "edgecolor": HATCH.get(key),
                "hatch": track.looks[key][3],
                "lw": 0,
            }
            # not axes.stairs, which measures every column: that takes most of a second
            self.axes.add_artist(StepPatch(high, edges * self.factor, baseline=low, fill=True, **look))
            low = high

    def lane(self, track: Track, lane: str, y: float) -> None:
        """A lane: span by span if they are large enough to see, else by pixel columns."""
        tall, compute = HEIGHTS[lane], lane == "compute"
        keys = [key for key in track.looks if track.looks[key][0] == lane]
        if compute:
            self.idle(track, y, tall)
        else:
            self.axes.axhline(y + tall, color=GRID, lw=0.6, zorder=0)
        start, end = self.window
        seen = {key: (track.layers[key][3] > start) & (track.layers[key][2] < end) for key in keys}
        if sum(mask.sum() for mask in seen.values()) > self.pixels / 8:
            self.fill(track, keys, y, tall)
            return
        for key in reversed(keys):  # work on top of waits, since it is work that can be very short
            _, face, ink, hatch, _ = track.looks[key]
            names, steps, starts, ends = (column[seen[key]] for column in track.layers[key])
            # Steps have no edge, which would hide or widen a gap. Others have one, so that short copies can be seen.
            self.bars(starts, ends, y, tall, face, HATCH.get(key, face), hatch, 0.0 if compute else 0.5)
            starts, ends = np.clip(starts, start, end), np.clip(ends, start, end)
            rooms = (ends - starts) * self.pixels / (end - start) if tall > 0.6 else np.zeros(len(ends))
            if lane == "host":  # blocks lie side by side, in one colour
                self.axes.vlines(starts[rooms > 13] * self.factor, y, y + tall, color="white", lw=0.8)
            for name, step, middle, room in zip(names, steps, (starts + ends) / 2, rooms, strict=True):
                text, turn = label(lane, str(name), int(step), room)
                if text:
                    look = {"color": ink, "rotation": turn, "clip_on": True}
                    self.text(middle, y + tall / 2, text, rim=face, **look)
        if compute:
            self.gaps(track, y, tall)

    def gaps(self, track: Track, y: float, tall: float) -> None:
        """The gaps between steps that are drawn one by one: with the word "idle" if there is room, as a white line if
        there is not even room for the hatch."""
        begins, stops = track.steps[1][:-1], track.steps[0][1:]
        seen = (stops > self.window[0]) & (begins < self.window[1])
        begins, stops = np.clip(begins[seen], *self.window), np.clip(stops[seen], *self.window)
        rooms = (stops - begins) * self.pixels / (self.window[1] - self.window[0])
        thin, wide = (rooms > 0.3) & (rooms < 6), rooms > 14
        self.bars(begins[thin], stops[thin], y, tall, IDLE[1])
        self.axes.vlines(begins[rooms <= 0.3] * self.factor, y, y + tall, color="white", lw=0.7)
        turn = 0 if wide.any() and np.median(rooms[wide]) > 34 else 90
        if turn == 0:
            wide &= rooms > 30  # at the edge of the window a gap can be cut, and its word would be
        for middle in (begins + stops)[wide] / 2:
            look = {"color": "#8A3B00", "weight": "bold", "rotation": turn, "clip_on": True}
            self.text(middle, y + tall / 2, "idle", IDLE[0], **look)
