"""Two timelines as lines of plain characters: a stretch of some steps, with the host above the device.

A column is as long as every other. The host's has a "#" where it works for most of the column, a ":" for some of it. A
step is drawn from edge to edge, and what no step covers is a ".", idle.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..timeline import Timeline, busy_curve

STEPS = 4  # of the synchronous run, in the stretch that is drawn
LABEL = 8  # characters before a lane
LOOKS = {"host": {" ": ""}, "device": {".": "idle"}}  # of cells that do not look like the others of their lane
LEGEND = "# host works (: for a part)    [= n =] the device computes step n    . device idle"


class Lane(NamedTuple):
    """A line: its label, and one character for each column. kind: "host" or "device"."""

    label: str
    cells: str
    kind: str


class Stretch(NamedTuple):
    """From when to when a timeline is drawn, in seconds of its own clock."""

    start: float
    end: float


def stretches(sync: Timeline, other: Timeline) -> tuple[Stretch, Stretch]:
    """Of both timelines stretches of one length, from the same step on: of the synchronous one `STEPS` periods whose
    length is nearest to the median one, in the middle half of its decode steps. ValueError for a run without steps."""
    steps, starts, ends = _decode_steps(sync)
    if len(steps) <= STEPS:
        begin, long, first = starts[0], ends[-1] - starts[0], steps[0]
    else:
        lengths = ends[STEPS:] - ends[:-STEPS]
        middle = np.arange(len(lengths) // 4, max(len(lengths) * 3 // 4, len(lengths) // 4 + 1))
        place = middle[np.argmin(np.abs(lengths[middle] - np.median(lengths)))]
        begin, long, first = ends[place], lengths[place], steps[place + 1]
    other_steps, other_starts, _ = _decode_steps(other)
    begin_other = other_starts[min(np.searchsorted(other_steps, first), len(other_steps) - 1)]
    return Stretch(begin, begin + long), Stretch(begin_other, begin_other + long)


def _decode_steps(timeline: Timeline) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(numbers, starts, ends) of the decode steps on the device; of all steps where there is none of them."""
    _, numbers, starts, ends = timeline.lane("compute")
    if not len(numbers):
        raise ValueError(f"the timeline {timeline.label!r} has no step on the device")
    decode = {step.step for step in timeline.steps if step.kind == "decode"}
    chosen = np.array([number in decode for number in numbers.tolist()])
    chosen = chosen if chosen.any() else np.ones(len(numbers), bool)
    return numbers[chosen], starts[chosen], ends[chosen]


def lanes(timeline: Timeline, stretch: Stretch, columns: int) -> tuple[Lane, Lane]:
    """The host and the device of a timeline, `columns` characters each."""
    return Lane("host", host_cells(timeline, stretch, columns), "host"), Lane(
        "device", device_cells(timeline, stretch, columns), "device"
    )


def host_cells(timeline: Timeline, stretch: Stretch, columns: int) -> str:
    work = [span for span in timeline.spans if span.lane == "host" and span.name != "wait"]
    if not work:
        return " " * columns
    curve = busy_curve([span.start for span in work], [span.end for span in work])
    edges = np.linspace(stretch.start, stretch.end, columns + 1)
    shares = np.diff(np.interp(edges, *curve)) / np.diff(edges)
    return "".join("#" if share >= 0.5 else ":" if share >= 0.1 else " " for share in shares)


def device_cells(timeline: Timeline, stretch: Stretch, columns: int) -> str:
    cells = ["."] * columns
    _, numbers, starts, ends = timeline.lane("compute")
    seconds = (stretch.end - stretch.start) / columns
    for number, start, end in zip(numbers.tolist(), starts, ends, strict=True):
        low, high = round((start - stretch.start) / seconds), round((end - stretch.start) / seconds)
        if high > 0 and low < columns:
            drawn = step_cells(number, high - low)
            for place in range(max(low, 0), min(high, columns)):
                cells[place] = drawn[place - low]
    return "".join(cells)


def step_cells(number: int, room: int) -> str:
    """A step in so many characters: "[=== 12 ===]", or without its number where that has no room."""
    if room < 2:
        return "=" * room
    label = f" {number} "
    return f"[{(label if len(label) <= room - 2 else '').center(room - 2, '=')}]"


def scale(stretch: Stretch, columns: int) -> str:
    """The time axis: 0 at the left, and the length of the stretch at the right."""
    right = f"{1e3 * (stretch.end - stretch.start):.1f} ms"
    return "0" + right.rjust(columns - 1)


def parts(lane: Lane) -> Sequence[tuple[str, str]]:
    """The cells of a lane in runs of one look: (text, "host", "device", "idle" or "")."""
    runs: list[tuple[str, str]] = []
    for cell in lane.cells:
        look = LOOKS[lane.kind].get(cell, lane.kind)
        if runs and runs[-1][1] == look:
            runs[-1] = (runs[-1][0] + cell, look)
        else:
            runs.append((cell, look))
    return runs
