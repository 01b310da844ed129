"""Ranks as lanes: of several devices that compute each step together, what the host and the device of each did.

    plot_ranks([batcher.timeline for batcher in batchers], collectives)

Each rank has a pair of lanes, host and compute. What a step spends at collectives (all-reduces) is drawn inside the
step: the wait until the last rank is there, and the exchange, by different colours, hatches and words. All ranks share
one time axis, so what one rank waits for stands in the lanes of another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..timeline import Timeline
from .picture import COLORS
from .timelines import LAYERS, Causes, Spans, TimelineFigure, Track, check_window, host_causes, one_line

LANES = ("host", "compute")
ROUNDING = 1e-6  # seconds by which the times of a collective may be out of order: clocks are read to microseconds
WAITS, MOVES = "waits", "all-reduce"  # the names of the two parts
LOOKS = {key: look for key, look in LAYERS.items() if look[0] in LANES} | {
    "held": ("compute", COLORS["yellow"], "black", "xxxx", "waits for other ranks"),
    "moves": ("compute", COLORS["purple"], "black", "||||", "all-reduce"),
}


class CollectiveSpan(NamedTuple):
    """One collective on one rank, a part of step number `step`. In seconds, on the clock of the rank's timeline: the
    rank arrived, the exchange began (when the last rank had arrived) and ended. Where a measurement cannot tell waiting
    from exchange, `began` is `arrived`."""

    step: int
    arrived: float
    began: float
    ended: float


class RankTrack(Track):
    """A rank, ready to draw: its steps are cut where it is at a collective."""

    lanes, looks = LANES, LOOKS

    def __init__(self, timeline: Timeline, name: str, origin: float, spans: Sequence[CollectiveSpan]):
        super().__init__(timeline, name, origin)
        step, *times = np.array(sorted(spans), float).reshape(-1, 4).T
        step, (arrived, began, ended) = step.astype(np.int64), (each - origin for each in times)
        began = np.maximum(began, arrived)
        ended = np.maximum(ended, began)
        for key in ("decode", "prefill"):
            self.layers[key] = _without(self.layers[key], step, arrived, ended)
        for key, word, low, high in (("held", WAITS, arrived, began), ("moves", MOVES, began, ended)):
            real = high > low
            words = np.full(int(real.sum()), word, object)
            self.layers[key] = words, step[real], low[real], high[real]
        in_steps = float(np.sum(self.steps[1] - self.steps[0]))
        if len(step) and in_steps > 0:
            waits, moves = (100 * float(np.sum(part)) / in_steps for part in (began - arrived, ended - began))
            self.caption += f", of its steps {moves:.1f} % all-reduce, {waits:.1f} % waits for other ranks"


def _without(layer: Spans, of_step: np.ndarray, arrived: np.ndarray, ended: np.ndarray) -> Spans:
    """The spans of a layer, cut into what is left of each when its collectives are taken out. of_step, arrived, ended:
    of the collectives, in the order of the steps, and of the times within a step."""
    names, steps, starts, ends = layer
    parts = []
    first, last = np.searchsorted(of_step, steps), np.searchsorted(of_step, steps, "right")
    for name, step, start, end, low, high in zip(names, steps, starts, ends, first, last, strict=True):
        edges = [start, *np.column_stack([arrived[low:high], ended[low:high]]).ravel(), end]
        parts += [(name, step, low, high) for low, high in zip(edges[::2], edges[1::2], strict=True) if high > low]
    words, numbers, lows, highs = zip(*parts, strict=True) if parts else ((), (), (), ())
    return np.array(words, object), np.array(numbers, np.int64), np.array(lows, float), np.array(highs, float)


def plot_ranks(timelines: Sequence[Timeline], collectives: Sequence[Sequence[CollectiveSpan]] | None = None, *,
               names: Sequence[str] | None = None, origins: Sequence[float] | None = None, title: str | None = None,
               window: tuple[float, float] | None = None, causes: Causes | None = None) -> TimelineFigure:  # fmt: skip
    """The ranks below each other on one time axis, with a lane of the host and a lane of the device for each.

    timelines: one a rank, in the order of the ranks. collectives: for each rank its `CollectiveSpan`s, in any order;
    None, or an empty list of a rank, if they are not known: its steps are then drawn whole.
    names: one a rank, None for "rank 0", "rank 1", ...
    origins: for each rank the moment on its own clock (seconds) that is 0 in the picture. None for ranks that share a
        clock, as on one machine: 0 is then where the first span of any rank begins.
    window, causes, title: as for `plot`.

    What `plot` returns, a PNG and in a notebook an interactive view. Raises ValueError without a timeline, for an empty
    window, for a collective that ends before it begins, and for lists that are not one a rank."""
    timelines = list(timelines)
    if not timelines or not all(isinstance(timeline, Timeline) for timeline in timelines):
        types = ", ".join(type(timeline).__name__ for timeline in timelines) or "nothing"
        raise ValueError(f"plot_ranks() wants a list of Timelines, one a rank, and was given: {types}")
    check_window(window)
    count = len(timelines)
    spans = [list(each) for each in collectives] if collectives is not None else [[] for _ in timelines]
    of_ranks = names if names is not None else [f"rank {number}" for number in range(count)]
    shared = min((one.origin for one in timelines if one.spans), default=0.0)
    zeros = list(origins) if origins is not None else [shared] * count
    for what, given in (("collectives", spans), ("names", of_ranks), ("origins", zeros)):
        if len(given) != count:
            raise ValueError(f"{what} has {len(given)} entries for {count} ranks: one a rank is needed")
    for rank, each in enumerate(spans):
        for one in each:
            in_order = one.arrived <= one.began + ROUNDING and one.began <= one.ended + ROUNDING
            if not in_order or math.isinf(one.ended - one.arrived):
                raise ValueError(f"rank {rank}: {one} is out of order: arrived <= began <= ended is needed, in seconds")
    tracks = [
        RankTrack(timeline, one_line(name, 40), zero, each)
        for timeline, name, zero, each in zip(timelines, of_ranks, zeros, spans, strict=True)
    ]
    return TimelineFigure(tracks, title, window, causes or host_causes)
