"""Where steps begin and end in a trace that does not say so. Of four rules, the first that works is taken:

1. A repeated annotation: `ProfilerStep#N`, or one that an engine wraps around its step. Everything launched within one
   occurrence is a step, whenever it ran.
2. Graph launches: all kernels of one launch have the same correlation id. Eager work between two launches is a step of
   its own if there is much of it (a prefill); otherwise it belongs to the step beside it.
3. Copies of results: a device-to-host copy that follows kernels ends a step.
4. The rarest kernel among those that recur after always the same number of kernels.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import numpy as np

from .events import Columns, Names


class Work(NamedTuple):
    """What ran on the compute stream, in order of start: kernels, memsets and copies within the device. All arrays have
    one element for each; times are nanoseconds.

    `launch`: when the host launched it; None where the trace does not say so for all. `name` is a number, `is_graph`
    says whether a graph launch brought it."""

    start: np.ndarray
    end: np.ndarray
    name: np.ndarray
    correlation: np.ndarray
    launch: np.ndarray | None
    is_graph: np.ndarray

    @property
    def length(self) -> np.ndarray:
        return self.end - self.start


class TraceSteps(NamedTuple):
    """The steps of a trace. `extents`: int64 [N, 2], start and end of each in nanoseconds, in order, not overlapping.
    `how`: a sentence that says how they were found. `note`: what else a reader should know."""

    extents: np.ndarray
    how: str
    note: str | None


class _Cut(NamedTuple):
    """How a rule cuts the work into steps. `step`: int64, the step of each piece of work, -1 where it is in none; any
    numbers will do. `how` and `note` as in `TraceSteps`."""

    step: np.ndarray
    how: str
    note: str | None = None


def find_steps(
    work: Work, results: np.ndarray, by_launch: bool, annotations: list[tuple], gpu_annotations: list[tuple], names
) -> TraceSteps:
    """The steps by the first of the four rules that gives at least two; if none does, the whole window is one step.

    `results`: when each copy to the host was launched or, without `by_launch`, when it began. `annotations` and
    `gpu_annotations`: (pattern of names, starts, ends) of those on the host and on the device, as `repeated` gives
    them. `names`: what `work.name` counts in."""
    by_copies = _by_copies(work, results, by_launch)
    copies = 0 if by_copies is None else int(by_copies.step.max()) + 1
    for cut in (
        _by_annotations(work, annotations, gpu_annotations, copies),
        _by_graphs(work, copies),
        by_copies,
        _by_pattern(work, names),
    ):
        if cut is not None and len(np.unique(cut.step[cut.step >= 0])) > 1:
            return TraceSteps(_extents(cut.step, work), cut.how, cut.note)
    how = "no step boundary was found (no annotation, graph launch, result copy or regular pattern of kernels): "
    one_step = np.zeros(len(work.start), np.int64)
    return TraceSteps(_extents(one_step, work), how + "the whole window is one step", None)


def _by_annotations(work: Work, on_host: list[tuple], on_device: list[tuple], copies: int) -> _Cut | None:
    """A step is what was launched within one occurrence of a repeated annotation; or, where launches are not known,
    what ran within it."""
    times, groups, verb = work.launch, on_host, "launched in it"
    if times is None:
        times, groups, verb = work.start, on_device, "that ran in it"
    candidates = []
    for pattern, starts, ends in groups:
        index = np.searchsorted(starts, times, "right") - 1
        inside = (index >= 0) & (times <= ends[np.maximum(index, 0)])
        count = len(np.unique(index[inside]))
        if count < 2 or work.length[inside].sum() < 0.9 * work.length.sum():
            continue
        profiler_step = pattern.startswith("ProfilerStep")
        far = abs(math.log(count / copies)) if copies > 1 else 0.0
        if profiler_step or far <= math.log(2):  # otherwise it is around a whole run, or a part of a step
            candidates.append((not profiler_step, far, count, pattern, np.where(inside, index, -1)))
    if not candidates:
        return None
    _, _, count, pattern, step = min(candidates, key=lambda candidate: candidate[:4])
    note = None
    if copies > 3 * count:
        note = (
            f"Each {pattern} holds about {copies / count:.0f} copies of results. If they are those of several batches, "
            "call prof.step() after each batch, or not at all."
        )
    how = f"a step is one of {count} annotations {pattern!r}: the kernels {verb}"
    return _Cut(_with_loose_work(step, work), how, note)


def _by_graphs(work: Work, copies: int) -> _Cut | None:
    """A step is a graph launch: its kernels share a correlation id."""
    if work.length[work.is_graph].sum() < 0.5 * work.length.sum():
        return None
    step = np.where(work.is_graph, work.correlation, -1)
    launches = len(np.unique(step[step >= 0]))
    if launches < 2 or (copies > 1 and launches > 1.5 * copies):  # then a graph is a piece of a step
        return None
    how = (
        f"a step is one of {launches} graph launches (kernels of one correlation id), or the eager kernels between two"
    )
    return _Cut(_with_loose_work(step, work), how)


def _by_copies(work: Work, results: np.ndarray, by_launch: bool) -> _Cut | None:
    """A copy to the host that follows work ends a step: everything launched before it belongs to that step; or, where
    launches are not known, everything that began before it."""
    times = work.launch if by_launch else work.start
    if times is None or not len(results):
        return None
    _, step = np.unique(np.searchsorted(np.sort(results), times, "left"), return_inverse=True)
    order = "launched" if by_launch else "begun"
    return _Cut(step, f"a step ends with a device-to-host copy that follows kernels ({order} before it)")


def _by_pattern(work: Work, names) -> _Cut | None:
    """A step is one period of the rarest kernel among those that recur after always the same number of kernels. It
    begins at the longest pause of the period."""
    total = len(work.start)
    _, first, inverse, counts = np.unique(work.name, return_index=True, return_inverse=True, return_counts=True)
    for kernel in sorted(np.flatnonzero(counts >= 3), key=lambda k: (counts[k], first[k])):
        places = np.flatnonzero(inverse == kernel)
        distances = np.diff(places)
        period = int(np.median(distances))
        if period < 2 or (distances == period).mean() < 0.8 or total > (len(places) + 2) * period:
            continue
        pauses = np.r_[0, work.start[1:] - np.maximum.accumulate(work.end)[:-1]]
        full = places[:-1][distances == period]
        offset = int(np.median(pauses[full[:, None] + np.arange(1, period + 1)], axis=0).argmax()) + 1
        begins = np.r_[places[0] - period, places] + offset
        step = np.searchsorted(begins, np.arange(total), "right")
        how = f"a step is a period of {period} kernels: {names[work.name[places[0]]]!r} is the rarest that recurs so"
        return _Cut(step, how)
    return None


def _with_loose_work(step: np.ndarray, work: Work) -> np.ndarray:
    """Give a step to the work that has none (-1). Each run of such work, from one piece with a step to the next, is
    looked at by itself.

    A run in the middle of a step belongs to that step. A short run between two steps, with less than half the work of a
    typical step, is what surrounds a step (sampling, preparing inputs): it is cut at its longest pause, and each part
    goes to the step on its side. A long run is a step of its own, a prefill, except for a short part at either end that
    is closer to the step there. Before the first step and after the last, work is in no step if the pause between them
    is at least as long as half a step's work."""
    step = step.copy()
    loose = step < 0
    edges = np.flatnonzero(np.diff(np.r_[False, loose, False]))
    _, index = np.unique(step[~loose], return_inverse=True)
    half = np.median(np.bincount(index, work.length[~loose])) / 2
    pauses = np.r_[half, work.start[1:] - np.maximum.accumulate(work.end)[:-1], half]  # before each piece of work
    done, fresh = np.r_[0, np.cumsum(work.length)], int(step.max()) + 1
    for begin, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        before = step[begin - 1] if begin else -1
        after = step[stop] if stop < len(step) else -1
        if before == after:
            step[begin:stop] = before
        elif done[stop] - done[begin] < half:
            cut = begin + int(pauses[begin : stop + 1].argmax())
            step[begin:cut], step[cut:stop] = before, after
        else:
            while stop - begin > 1:
                cut = begin + 1 + int(pauses[begin + 1 : stop].argmax())
                if done[cut] - done[begin] < half and pauses[begin] < pauses[cut]:
                    step[begin:cut], begin = before, cut
                elif done[stop] - done[cut] < half and pauses[stop] < pauses[cut]:
                    step[cut:stop], stop = after, cut
                else:
                    break
            step[begin:stop] = fresh
            fresh += 1
    return step


def _extents(step: np.ndarray, work: Work) -> np.ndarray:
    """int64 [N, 2]: start and end of each step, in order. Where two overlap, the later one begins at the end of the
    earlier one."""
    kept = step >= 0
    _, index = np.unique(step[kept], return_inverse=True)
    extents = np.full((int(index.max()) + 1, 2), (np.iinfo(np.int64).max, np.iinfo(np.int64).min), np.int64)
    np.minimum.at(extents[:, 0], index, work.start[kept])
    np.maximum.at(extents[:, 1], index, work.end[kept])
    extents = extents[np.lexsort((extents[:, 1], extents[:, 0]))]
    extents[:, 1] = np.maximum.accumulate(extents[:, 1])
    extents[1:, 0] = np.maximum(extents[1:, 0], extents[:-1, 1])
    return extents


def pattern_of(name: str) -> str:
    """The name with # in place of its numbers: the same for all occurrences of an annotation."""
    return re.sub(r"#?\d+", "#", name)


def repeated(annotations: Columns, names: list[str], thread: int | None = None) -> list[tuple]:
    """(pattern of names, starts, ends), in order of start, of the annotations that occur more than once and never
    overlap themselves: on one thread, or on all of them taken as one. At most the hundred patterns that cover most time
    are given."""
    count = len(annotations["name"])
    rows = np.arange(count) if thread is None else np.flatnonzero(annotations["thread"] == thread)
    starts, ends, numbers = (annotations[key][rows] for key in ("start", "end", "name"))
    order = np.lexsort((ends, starts))
    starts, ends, numbers = starts[order], ends[order], numbers[order]
    patterns, pattern_numbers = Names(), np.zeros(len(names), np.int64)
    for number in np.unique(numbers).tolist():
        pattern_numbers[number] = patterns[pattern_of(names[number])]
    groups, of_row = [], pattern_numbers[numbers]
    for pattern, number in patterns.items():
        begins, stops = starts[of_row == number], ends[of_row == number]
        if len(begins) > 1 and (begins[1:] >= stops[:-1]).all():
            groups.append((pattern, begins, stops))
    return sorted(groups, key=lambda group: (-(group[2] - group[1]).sum(), group[0]))[:100]
