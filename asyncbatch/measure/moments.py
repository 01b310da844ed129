"""The moments of each step: when the host was free for it, had launched it and had its results, and when the device did
its part. `simulate.py` and `attribution.py` both start from them, so that they mean the same by "hidden" and "late".

A launch takes the host a while, and the device may begin before it is over. What the host does after that is hidden,
also in the synchronous loop: nobody waits for it.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from typing import NamedTuple

from ..timeline import Timeline
from .points import LANE

HOST = ("plan", "fill", "launch")


class Moments(NamedTuple):
    """Of one step that has a span on the device; seconds on the timeline's clock, and (start, end) of what lasts.

    free: the host had ended what came before: a commit or a launch. copy_launched, launched, launch_end: the copy in
    was launched, the step was, and the host was done with launching. ready: the end of the step before, on the device.
    waited, committed: the host's wait for the output ids, and the end of the commit."""

    step: int
    kind: str
    free: float
    copy_launched: float
    launched: float
    launch_end: float
    ready: float
    copy_in: tuple[float, float]
    computed: tuple[float, float]
    copy_out: tuple[float, float]
    waited: tuple[float, float]
    committed: float


def moments_of(timeline: Timeline) -> list[Moments]:
    """The moments of every step that was noted and has a span on the device, in the order of the steps.

    What has no span is taken for something that took no time. Within a launch, the points (`record_points`) tell when
    the copy and the step were launched; without them, and where the device was sooner, its own times do. ValueError if
    the timeline has dropped steps."""
    timeline.check_whole("an account of each step's moments")
    at: dict[tuple[str, str, int], tuple[float, float]] = {}
    last, ready = -math.inf, {}  # ready: of each step on the device, the end of the one before it
    for lane, name, step, start, end in sorted(timeline.spans, key=lambda span: span.start):
        key = lane, name if lane in ("host", LANE) else "", step  # a lane of the device has one span for each step
        first, reach = at.get(key, (start, end))
        at[key] = min(first, start), max(reach, end)
        if lane == "compute":
            ready[step], last = min(last, start), max(last, end)
    kinds = {step.step: step.kind for step in timeline.steps}
    made: list[Moments] = []
    done = [timeline.origin]  # the ends of the commits so far, rising
    for number in sorted(ready):  # also one that an interrupt kept from being noted: the others follow it
        made.append(_moments(number, kinds.get(number, ""), at, ready[number], done, made[-1:]))
        done.append(max(done[-1], made[-1].committed))
    return [one for one in made if one.step in kinds]


def _moments(
    number: int, kind: str, at: dict, ready: float, done: Sequence[float], before: Sequence[Moments]
) -> Moments:
    start, end = at["compute", "", number]
    host = {name: at["host", name, number] for name in HOST if ("host", name, number) in at}
    launch_start, launch_end = host.get("launch") or (max([e for _, e in host.values()], default=start),) * 2
    launched = min(at.get((LANE, "D2H launch", number), (launch_end,))[0], start)
    copy_in = at.get(("H2D", "", number))
    copied = launched if copy_in is None else copy_in[0]
    copy_launched = min(at.get((LANE, "step launch", number), (launched,))[0], copied, launched)
    copy_out = at.get(("D2H", "", number), (end, end))
    commit_start, committed = at.get(("host", "commit", number), (copy_out[1], copy_out[1]))
    waited = at.get(("host", "wait", number), (commit_start, commit_start))
    # What came before: a commit, of those in flight some are later; or the launch of the step before.
    committed_before = done[max(bisect.bisect_right(done, launch_start) - 1, 0)]
    free = max([committed_before, *(one.launch_end for one in before)])
    return Moments(
        number,
        kind,
        min(free, copy_launched),
        copy_launched,
        launched,
        max(launch_end, launched),
        ready,
        copy_in or (copy_launched, copy_launched),
        (start, end),
        copy_out,
        waited,
        max(committed, waited[1]),
    )
