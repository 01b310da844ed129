"""Notebooks 04 and 05: the rounds of a loop, with every block of the host labelled, and which slot each step uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.patches import Patch, Rectangle

from ..devices.virtual import Costs
from ..pictures.picture import COLORS, TEXT, Picture, figure
from ..slot import slot_of
from ..timeline import LANES, Timeline
from .small import smaller

# Seconds: a host that needs 4.4 ms for a step, in front of a device that needs 6. So every block has room for its name.
COSTS = Costs(plan=1e-3, fill=1e-3, launch=1.2e-3, commit=1.2e-3, copy_in=0.5e-3, step=6e-3, copy_out=0.5e-3)
SLOT_COLORS = ("sky", "orange", "green", "yellow")
IDLE = {"facecolor": "#FBE9DF", "edgecolor": COLORS["vermillion"], "hatch": "\\\\\\\\", "linewidth": 0}
WAIT = {"facecolor": "#F2F2F2", "edgecolor": "#BBBBBB", "linewidth": 0.7}
TALL = {"host": 1.9, "H2D": 0.6, "compute": 0.9, "D2H": 0.6}  # rows
POINTS = 72 * 8.7  # width of the axes


def draw_rounds(
    timelines: Mapping[str, Timeline], num_slots: int = 2, window: tuple[float, float] | None = None
) -> Picture:
    """Timelines below each other on one axis of milliseconds. A block is coloured by the slot of its step and bears the
    step's number; where the device has nothing to do, it is hatched.

    num_slots: of the asynchronous ones; a synchronous one ("sync") has one slot. window: which seconds of the runs to
    show, from their beginnings; None: all."""
    rows = sum(TALL.values()) + 1.1
    picture = figure(10, 0.75 + 0.30 * rows * len(timelines))
    axes: Any = picture.axes
    end = max(span.end - timeline.origin for timeline in timelines.values() for span in timeline.spans)
    low, high = (0.0, end) if window is None else window
    axes.set(xlim=(1e3 * low, 1e3 * high), ylim=(rows * len(timelines) - 0.2, 0))
    ticks, captions, most = {}, [], 1
    for number, (title, timeline) in enumerate(timelines.items()):
        top = number * rows + 0.75
        _, steps, starts, ends = timeline.lane("compute")
        slots = 1 if timeline.label == "sync" else num_slots
        most = max(most, slots)
        captions.append(f"{title}: {len(steps)} steps")
        axes.text(1e3 * low, top - 0.38, title, fontsize=10, fontweight="bold", va="center", parse_math=False)
        for lane in LANES:
            ticks[top + TALL[lane] / 2] = lane
            if lane == "compute" and len(starts):
                begin, stop = max(starts.min() - timeline.origin, low), min(ends.max() - timeline.origin, high)
                if stop > begin:
                    axes.add_patch(Rectangle((1e3 * begin, top), 1e3 * (stop - begin), TALL[lane], **IDLE))
            for name, step, start, stop in zip(*timeline.lane(lane), strict=True):
                start, stop = start - timeline.origin, stop - timeline.origin
                if stop > low and start < high:
                    box = (1e3 * max(start, low), 1e3 * min(stop, high), top, TALL[lane])
                    _block(axes, box, lane, name, step, slots, POINTS / (1e3 * (high - low)))
            top += TALL[lane] + 0.08
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.set_xlabel("milliseconds since the run began", fontsize=9, color=TEXT)
    axes.tick_params(labelsize=8.5, axis="both", length=2)
    axes.spines["left"].set_visible(False)
    looks = [Patch(color=COLORS[SLOT_COLORS[slot]], label=f"slot {slot}") for slot in range(most)]
    looks += [Patch(label="host waits", **WAIT), Patch(label="device idle", **IDLE)]
    picture.figure.legend(handles=looks, loc="outside lower center", ncols=len(looks), frameon=False, fontsize=8)
    picture.title = "; ".join(captions)
    return smaller(picture)


def _block(axes: Any, box: tuple, lane: str, name: str, step: int, num_slots: int, points_per_ms: float) -> None:
    start, end, top, tall = box
    waits = name == "wait"
    color = COLORS[SLOT_COLORS[slot_of(int(step), num_slots) % len(SLOT_COLORS)]]
    look = WAIT if waits else {"facecolor": color, "edgecolor": "white", "linewidth": 0.7}
    axes.add_patch(Rectangle((start, top), end - start, tall, **look))
    room = (end - start) * points_per_ms
    words = {"host": f"{name} {step}", "compute": f"step {step}"}.get(lane, str(step))
    flat = room > 4.6 * len(words) + 2
    turned = lane == "host" and not flat and room > 8.5
    if not flat and not turned and room > 4.6 * len(str(step)) + 2:
        words, flat = str(step), True
    if flat or turned:
        axes.text((start + end) / 2, top + tall / 2, words, fontsize=7.5, ha="center", va="center",
                  rotation=90 if turned else 0, color="#444444" if waits else "black", clip_on=True)  # fmt: skip
