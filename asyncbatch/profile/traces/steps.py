"""Where steps begin and end in a trace that does not say so. Of four rules, the first that works is taken:

1. Annotations that are steps (`annotations.py` says which). Everything launched within one is a step, whenever it ran.
2. Graph launches: all kernels of one launch have the same correlation id. Eager work between two launches is a step of
   its own if there is much of it (a prefill); otherwise it belongs to the step beside it.
3. Copies of results: a device-to-host copy that follows kernels ends a step.
4. Where nothing is copied to the host, the rarest kernel among those that recur after always the same number of
   kernels.

By no rule are the kernels of one graph launch divided.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .annotations import Group, choose

UNKNOWN = np.iinfo(np.int64).min  # the time of a launch that was not recorded


class Work(NamedTuple):
    """What ran on the compute stream, in order of start: kernels, memsets and copies within the device. All arrays have
    one element for each; times are nanoseconds.

    `launch`: when the host launched it; UNKNOWN where the trace does not say so. `name` is a number, `is_graph` says
    whether a graph launch brought it."""

    start: np.ndarray
    end: np.ndarray
    name: np.ndarray
    correlation: np.ndarray
    launch: np.ndarray
    is_graph: np.ndarray

    @property
    def length(self) -> np.ndarray:
        return self.end - self.start

    @property
    def known(self) -> np.ndarray:
        """Whether it is known when it was launched."""
        return self.launch != UNKNOWN

    @property
    def launch_order(self) -> np.ndarray | None:
        """When each was launched; those of which it is not known take the launch before them, since a stream works in
        the order of launches. None where these are more than half."""
        known = self.known
        if known.mean() <= 0.5:
            return None
        return self.launch[np.maximum.accumulate(np.where(known, np.arange(len(known)), known.argmax()))]


class TraceSteps(NamedTuple):
    """The steps of a trace. `extents`: int64 [N, 2], start and end of each in nanoseconds, in order, not overlapping.
    `launch`: int64 [N], when the first kernel of each was launched, UNKNOWN where the trace does not say so. `how`: a
    sentence that says how they were found. `note`: what else a reader should know."""

    extents: np.ndarray
    launch: np.ndarray
    how: str
    note: str | None


class _Cut(NamedTuple):
    """How a rule cuts the work into steps. `step`: int64, the step of each piece of work, -1 where it is in none; any
    numbers will do. `how` and `note` as in `TraceSteps`. `even_one`: a single step is one, too."""

    step: np.ndarray
    how: str
    note: str | None = None
    even_one: bool = False


def find_steps(
    work: Work,
    results: np.ndarray,
    by_launch: bool,
    annotations: Sequence[Group],
    gpu_annotations: Sequence[Group],
    names: Sequence[str],
) -> TraceSteps:
    """The steps by the first of the four rules that gives at least two, or one annotated one; if none does, the whole
    window is one step.

    `results`: when each copy to the host was launched or, without `by_launch`, when it began. `annotations` and
    `gpu_annotations`: those on the host and on the device. `names`: what `work.name` counts in."""
    times = work.launch_order if by_launch else work.start
    before = np.searchsorted(np.sort(results), times, "left") if len(results) and times is not None else None
    copies = 0 if before is None else len(np.unique(before[before < len(results)]))  # that follow work
    for cut in (
        _by_annotations(work, annotations, gpu_annotations, copies),
        _by_graphs(work, copies),
        _by_copies(before, by_launch) if copies > 1 else None,  # a single one only tells before from after
        _by_pattern(work, names) if not copies else None,
    ):
        if cut is not None:
            step = _whole_graphs(cut.step, work)
            if len(np.unique(step[step >= 0])) > 1 or cut.even_one:
                return _steps(step, work, cut.how, cut.note)
    how = "no step boundary was found (no annotation, graph launch, result copy or regular pattern of kernels): "
    return _steps(np.zeros(len(work.start), np.int64), work, how + "the whole window is one step", None)


def _by_annotations(work: Work, on_host: Sequence[Group], on_device: Sequence[Group], copies: int) -> _Cut | None:
    """A step is what was launched within one annotation of those that `choose` takes; or, where launches are not known,
    what ran within it."""
    times, groups, known, verb = work.launch_order, on_host, work.known, "launched in it"
    if times is None:
        times, groups, known, verb = work.start, on_device, np.ones(len(work.start), bool), "that ran in it"
    chosen = choose(groups, times, work.length, copies)
    if chosen is None:
        return None
    count, shown = chosen.number, " or ".join(map(repr, chosen.patterns))
    note = None
    if copies > 3 * count:
        note = (
            f"Each {shown} holds about {copies / count:.0f} copies of results. If they are those of several batches, "
            "call prof.step() after each batch, or not at all."
        )
    how = f"a step is one of {count} annotations {shown}: the kernels {verb}"
    if count == 1:
        how = f"there is one annotation {shown}: its step is the kernels {verb}"
    step = chosen.step
    if count > 1:
        step = _with_loose_work(_between_known(step, known, work), work)
    return _Cut(step, how, note, True)


def _by_graphs(work: Work, copies: int) -> _Cut | None:
    """A step is a graph launch: its kernels share a correlation id."""
    if work.length[work.is_graph].sum() < 0.5 * work.length.sum():
        return None
    step = np.where(work.is_graph, work.correlation, -1)
    launches = len(np.unique(step[step >= 0]))
    if launches < 2 or (copies > 0 and launches > 1.5 * copies):  # then a graph is a piece of a step
        return None
    how = (
        f"a step is one of {launches} graph launches (kernels of one correlation id), or the eager kernels between two"
    )
    return _Cut(_with_loose_work(step, work), how)


def _by_copies(before: np.ndarray | None, by_launch: bool) -> _Cut:
    """A copy to the host that follows work ends a step: everything launched before it belongs to that step; or, where
    launches are not known, everything that began before it. before: how many copies come before each piece of work."""
    order = "launched" if by_launch else "begun"
    assert before is not None
    return _Cut(before, f"a step ends with a device-to-host copy that follows kernels ({order} before it)")


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


def _between_known(step: np.ndarray, known: np.ndarray, work: Work) -> np.ndarray:
    """Give a step to the work of which it is not known when it was launched. Each run of it belongs to the steps beside
    it: it is cut at its longest pause."""
    step, pauses = step.copy(), np.r_[0, work.start[1:] - np.maximum.accumulate(work.end)[:-1], 0]
    edges = np.flatnonzero(np.diff(np.r_[False, ~known, False]))
    for begin, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        before, after = step[begin - 1] if begin else -1, step[stop] if stop < len(step) else -1
        cut = begin + int(pauses[begin : stop + 1].argmax())
        step[begin:cut], step[cut:stop] = before, after
    return step


def _whole_graphs(step: np.ndarray, work: Work) -> np.ndarray:
    """The kernels of one graph launch are all in the step of the first of them."""
    rows, step = np.flatnonzero(work.is_graph & (work.correlation > 0)), step.copy()
    _, first, launch = np.unique(work.correlation[rows], return_index=True, return_inverse=True)
    step[rows] = step[rows][first][launch]
    return step


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


def _steps(step: np.ndarray, work: Work, how: str, note: str | None) -> TraceSteps:
    """The steps of work that is numbered: start and end of each, in order. Where two overlap, the later one begins at
    the end of the earlier one."""
    kept = np.flatnonzero(step >= 0)
    _, first, index = np.unique(step[kept], return_index=True, return_inverse=True)
    extents = np.full((len(first), 2), (np.iinfo(np.int64).max, np.iinfo(np.int64).min), np.int64)
    np.minimum.at(extents[:, 0], index, work.start[kept])
    np.maximum.at(extents[:, 1], index, work.end[kept])
    order = np.lexsort((extents[:, 1], extents[:, 0]))
    extents, launch = extents[order], work.launch[kept[first]][order]
    extents[:, 1] = np.maximum.accumulate(extents[:, 1])
    extents[1:, 0] = np.maximum(extents[1:, 0], extents[:-1, 1])
    return TraceSteps(extents, launch, how, note)
