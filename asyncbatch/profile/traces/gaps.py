"""The idle gaps of a trace, and what the host was doing in each.

Between two steps a gap is all the time from the end of the one to the start of the other. Inside a step it is time in
which nothing runs on the device. The host is the thread that launches the steps; where nothing was recorded on it, the
other threads that launch work are asked, the busiest first (in training, one thread launches the backward pass and
another one loads the data). Of the events of a thread the innermost one counts, so the causes of a gap add up to it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...measure.points import NOTHING
from ...timeline import Gap, union
from .annotations import OF_THE_PROFILER, pattern_of
from .events import ANNOTATION, PYTHON, RUNTIME, Columns, Names
from .intervals import Stretches, covered_before, innermost, intersections, outside

WAITS = re.compile(r"Synchronize|(cuda|hip)Memcpy$")  # calls of the runtime that wait for the device


@dataclass(frozen=True)
class TraceGap(Gap):
    """The device idle from `start` to `end` (seconds): before step `step`, or in the middle of it where `inside`.

    `host_s`: seconds by what the launching host thread was doing; they add up to the gap."""

    inside: bool = False

    @property
    def ms(self) -> float:
        return 1e3 * self.seconds

    @property
    def cause(self) -> str:
        """What took most of it."""
        return max(self.host_s, key=self.host_s.__getitem__)


class TraceGaps(Sequence):
    """The gaps in order of time. A `TraceGap` is made only when it is asked for: a trace can have millions.

    `ns`, `steps`, `inside`: the length, the step and the kind of each gap, as arrays. `causes`: the names of the
    causes; `pieces`: (gap, cause, nanoseconds) of each cause of each gap, as three arrays in order of the gaps."""

    def __init__(self, starts, ends, steps, inside, causes: list[str], pieces: tuple[np.ndarray, ...]):
        self.ns = ends - starts
        self.steps, self.inside, self.causes = steps, inside, causes
        self._starts, self._ends = starts, ends
        self._gap, self._cause, self._ns = pieces
        self._first = np.searchsorted(self._gap, np.arange(len(starts) + 1))  # the first piece of each gap

    def __len__(self) -> int:
        return len(self.ns)

    def __getitem__(self, at):
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        at = range(len(self))[at]
        part = slice(self._first[at], self._first[at + 1])
        host_s = {
            self.causes[cause]: 1e-9 * ns
            for cause, ns in zip(self._cause[part].tolist(), self._ns[part].tolist(), strict=True)
        }
        bounds = 1e-9 * float(self._starts[at]), 1e-9 * float(self._ends[at])
        return TraceGap(int(self.steps[at]), *bounds, host_s, bool(self.inside[at]))

    def ns_by_cause(self, inside: bool | None = None) -> dict[str, int]:
        """Nanoseconds by cause over all gaps, the largest first. `inside`: True counts only the gaps inside steps,
        False only those between steps."""
        counted = np.ones(len(self._gap), bool) if inside is None else self.inside[self._gap] == inside
        totals = np.zeros(len(self.causes), np.int64)
        np.add.at(totals, self._cause[counted], self._ns[counted])
        order = sorted(np.flatnonzero(totals), key=lambda cause: (-totals[cause], self.causes[cause]))
        return {self.causes[cause]: int(totals[cause]) for cause in order}

    def longest(self, count: int) -> list[TraceGap]:
        """The `count` longest gaps, the longest first."""
        order = np.lexsort((self._starts, -self.ns))[:count]
        return [self[int(at)] for at in order]


def no_gaps() -> TraceGaps:
    """No gap at all, for a trace that cannot tell of any."""
    none = np.zeros(0, np.int64)
    return TraceGaps(none, none, none, np.zeros(0, bool), [], (none, none, none))


def find_gaps(steps: np.ndarray, busy: Stretches, threads: Sequence[Columns], names: list[str]) -> TraceGaps:
    """The gaps between steps and inside them.

    steps: int64 [N, 2], start and end of each. busy: the stretches in which anything runs on the device. threads: the
    events of each launching thread, in order of start, outer events before inner ones. names: what the column `name`
    counts in."""
    starts, ends, of_step, inside = _idle_stretches(steps, busy)
    return TraceGaps(starts, ends, of_step, inside, *host_pieces(starts, ends, threads, names))


def _idle_stretches(steps: np.ndarray, busy: Stretches) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(starts, ends, steps, inside) of all gaps, in order of time."""
    between_steps = steps[:-1, 1], steps[1:, 0], np.arange(1, len(steps))
    real = steps[:, 1] > steps[:, 0]
    numbers = np.flatnonzero(real)
    idle = outside(busy[0], busy[1], steps[0, 0], steps[-1, 1])
    inside_starts, inside_ends, index, _ = intersections((steps[real, 0], steps[real, 1]), idle)
    starts = np.r_[between_steps[0], inside_starts]
    ends = np.r_[between_steps[1], inside_ends]
    of_step = np.r_[between_steps[2], numbers[index]]
    inside = np.arange(len(starts)) >= len(between_steps[0])
    order = np.lexsort((ends, starts))
    order = order[ends[order] > starts[order]]
    return starts[order], ends[order], of_step[order], inside[order]


def host_pieces(
    gap_starts: np.ndarray, gap_ends: np.ndarray, threads: Sequence[Columns], names: list[str]
) -> tuple[list[str], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(causes, pieces) of stretches in which the device is idle, as `TraceGaps` takes them."""
    numbers = Names({NOTHING: 0})
    rest = (gap_ends - gap_starts).astype(np.int64)
    free = gap_starts, gap_ends  # what no thread before has told about
    found: list[tuple[np.ndarray, ...]] = []
    for host in threads:
        begins, stops, doing = _doing(*free, host, names, numbers)
        starts, ends, gap, piece = intersections((gap_starts, gap_ends), (begins, stops))
        if len(found):  # of the gap, only what is still free
            starts, ends, index, _ = intersections((starts, ends), free)
            gap, piece = gap[index], piece[index]
        np.subtract.at(rest, gap, ends - starts)
        found.append((gap, doing[piece], ends - starts))
        if not rest.any():
            break
        free = _without(free, union(starts, ends))
    unrecorded = np.flatnonzero(rest)
    found.append((unrecorded, np.zeros_like(unrecorded), rest[unrecorded]))
    gap, cause, ns = (np.concatenate(column) for column in zip(*found, strict=True))
    keys, inverse = np.unique(gap * len(numbers) + cause, return_inverse=True)
    totals = np.zeros(len(keys), np.int64)
    np.add.at(totals, inverse, ns)
    return list(numbers), (keys // len(numbers), keys % len(numbers), totals)


def _doing(
    free_starts: np.ndarray, free_ends: np.ndarray, host: Columns, names: list[str], numbers: Names
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(starts, ends, number of the cause) of what a thread was doing; only near the free stretches, since events are
    looked at one by one."""
    starts, ends, name, kind = (host[key] for key in ("start", "end", "name", "kind"))
    near = covered_before(ends, free_starts, free_ends) > covered_before(starts, free_starts, free_ends)
    pairs, cause_of = np.unique(name[near] * 16 + kind[near].astype(np.int64), return_inverse=True)
    causes = np.array([numbers[host_cause(names[pair // 16], pair % 16)] for pair in pairs.tolist()], np.int64)
    return innermost(starts[near], ends[near], causes[cause_of] if len(pairs) else cause_of)


def _without(stretches: Stretches, taken: Stretches) -> Stretches:
    """What is left of stretches. Both are in order, and neither overlaps itself."""
    if not len(stretches[0]) or not len(taken[0]):
        return stretches
    low, high = int(stretches[0][0]), int(stretches[1][-1])
    starts, ends, _, _ = intersections(stretches, outside(*taken, low, high))
    return starts, ends


def host_cause(name: str, kind: int) -> str:
    """The cause that an event of the host stands for: its name without what differs from one occurrence to the next."""
    if kind == RUNTIME:
        return f"{name} (waiting)" if WAITS.search(name) else name
    if kind == ANNOTATION:  # the profiler's own only says that nothing else was recorded in it
        return NOTHING if OF_THE_PROFILER.search(name) else pattern_of(name)
    if kind == PYTHON:
        name = re.sub(r" at 0x[0-9a-fA-F]+", "", name)
        name = re.sub(r"^(nn\.Module: \w+?)_\d+$", r"\1", name)
        return re.sub(r"^\S*[/\\](?=[^/\\]+\.pyx?\(\d+\): )", "", name)
    return name
