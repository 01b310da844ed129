"""The idle gaps of a trace, and what the host was doing in each.

Between two steps a gap is all the time from the end of the one to the start of the other. Inside a step it is time in
which nothing runs on the device. The host is the thread that launches the steps. Of the events recorded there, the
innermost one counts, so the causes of a gap add up to it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...measure.points import NOTHING
from ...timeline import Gap
from .events import ANNOTATION, PYTHON, RUNTIME, Columns, Names
from .intervals import Stretches, covered_before, innermost, intersections, outside
from .steps import pattern_of

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


def find_gaps(steps: np.ndarray, busy: Stretches, host: Columns, names: list[str]) -> TraceGaps:
    """The gaps between steps and inside them.

    steps: int64 [N, 2], start and end of each. busy: the stretches in which anything runs on the device. host: the
    events of the launching thread, in order of start, outer events before inner ones. names: what the column `name`
    counts in."""
    starts, ends, of_step, inside = _idle_stretches(steps, busy)
    return TraceGaps(starts, ends, of_step, inside, *_host_pieces(starts, ends, host, names))


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


def _host_pieces(
    gap_starts: np.ndarray, gap_ends: np.ndarray, host: Columns, names: list[str]
) -> tuple[list[str], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(causes, pieces) of the gaps, as `TraceGaps` takes them."""
    starts, ends, name, kind = (host[key] for key in ("start", "end", "name", "kind"))
    # Events are looked at one by one, so only those that overlap a gap.
    near_gap = covered_before(ends, gap_starts, gap_ends) > covered_before(starts, gap_starts, gap_ends)
    pairs, cause_of = np.unique(name[near_gap] * 16 + kind[near_gap].astype(np.int64), return_inverse=True)
    numbers = Names({NOTHING: 0})
    causes = np.array([numbers[host_cause(names[pair // 16], pair % 16)] for pair in pairs.tolist()], np.int64)
    begins, stops, doing = innermost(starts[near_gap], ends[near_gap], causes[cause_of] if len(pairs) else cause_of)
    begins, stops, gap, piece = intersections((gap_starts, gap_ends), (begins, stops))
    cause, ns = doing[piece], stops - begins
    rest = (gap_ends - gap_starts).astype(np.int64)
    np.subtract.at(rest, gap, ns)
    unrecorded = np.flatnonzero(rest)
    gap, cause, ns = np.r_[gap, unrecorded], np.r_[cause, np.zeros_like(unrecorded)], np.r_[ns, rest[unrecorded]]
    keys, inverse = np.unique(gap * len(numbers) + cause, return_inverse=True)
    totals = np.zeros(len(keys), np.int64)
    np.add.at(totals, inverse, ns)
    return list(numbers), (keys // len(numbers), keys % len(numbers), totals)


def host_cause(name: str, kind: int) -> str:
    """The cause that an event of the host stands for: its name without what differs from one occurrence to the next."""
    if kind == RUNTIME:
        return f"{name} (waiting)" if WAITS.search(name) else name
    if kind == ANNOTATION:
        return pattern_of(name)
    if kind == PYTHON:
        name = re.sub(r" at 0x[0-9a-fA-F]+", "", name)
        name = re.sub(r"^(nn\.Module: \w+?)_\d+$", r"\1", name)
        return re.sub(r"^\S*[/\\](?=[^/\\]+\.pyx?\(\d+\): )", "", name)
    return name
