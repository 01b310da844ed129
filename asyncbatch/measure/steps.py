"""The steps of one run as columns of numbers: taken from a timeline, packed into a recording, and unpacked again.

Times are rounded to whole microseconds once, in `steps_from`. Numbers that are constant or rise evenly for long
stretches (rows, context, ...) are stored as arithmetic runs, [first, increment, count].
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..timeline import Timeline, device_activity

PACKED = ("rows", "context", "tokens", "wasted")  # what is stored as arithmetic runs


class Steps(NamedTuple):
    """The steps of one run, in order. Every array has one element for each step; times are microseconds.

    device_us, gap_us: int64, the step on the device, and the idle time before it (0 for the first). Device times come
    from CUDA events, so a gap can be slightly negative. host_us: float64, host work that is not waiting; nan where none
    was recorded. kind: object, "decode" or "prefill" (a step with any prefill row). rows, context, tokens, wasted:
    int64; context is the tokens that a row's last query attends to, summed over the rows.
    before_us, after_us: from the beginning of the run to its first step on the device, and from the last one to the
    end.
    """

    before_us: int
    after_us: int
    device_us: np.ndarray
    gap_us: np.ndarray
    host_us: np.ndarray
    kind: np.ndarray
    rows: np.ndarray
    context: np.ndarray
    tokens: np.ndarray
    wasted: np.ndarray

    def first(self, count: int) -> Steps:
        """The same run with its first `count` steps only."""
        return Steps(self.before_us, self.after_us, *(array[:count] for array in self[2:]))

    def totals(self) -> dict[str, Any]:
        """The numbers of `Timeline.summary().as_dict()`, computed from the rounded times."""
        ends = np.cumsum(self.gap_us + self.device_us)
        decode = self.kind == "decode"
        active_us, period_us = device_activity(ends - self.device_us, ends, decode)
        wall_s = round(1e-6 * (self.before_us + int(ends[-1] if len(ends) else 0) + self.after_us), 6)
        tokens = int(self.tokens.sum())
        active = min(1.0, active_us / period_us) if period_us > 0 else None
        host = self.host_us[decode & ~np.isnan(self.host_us)]
        return {
            "wall_s": wall_s,
            "tokens": tokens,
            "tokens_per_s": tokens / wall_s if wall_s > 0 else 0.0,
            "steps": len(ends),
            "decode_steps": int(decode.sum()),
            "device_active": active,
            "idle": None if active is None else 1.0 - active,
            "host_ms_per_step": 1e-3 * float(np.median(host)) if len(host) else None,
            "wasted_tokens": int(self.wasted.sum()),
        }


def steps_from(timeline: Timeline) -> Steps:
    """The steps of a measured timeline, in whole microseconds.

    ValueError if the timeline has no steps, has dropped some, or has one without a time on the device (it failed)."""
    timeline.check_whole("a recording")
    _, numbers, starts, ends = timeline.lane("compute")
    known = {step.step: step for step in timeline.steps}
    if not known or sorted(known) != sorted(numbers.tolist()):
        raise ValueError(
            f"the timeline {timeline.label!r} has {len(known)} steps and {len(numbers)} of them on the device: "
            "only a run whose every step was measured can be recorded"
        )
    # Moments are rounded, not differences. So all parts add up to the wall time, to the microsecond.
    starts, ends = (np.rint(1e6 * (times - timeline.origin)).astype(np.int64) for times in (starts, ends))
    last = round(1e6 * (max(span.end for span in timeline.spans) - timeline.origin))
    host: dict[int, float] = {}
    for span in timeline.spans:
        if span.lane == "host" and span.name != "wait":
            host[span.step] = host.get(span.step, 0.0) + span.end - span.start
    steps = [known[number] for number in numbers.tolist()]
    return Steps(
        int(starts[0]),
        int(last - ends[-1]),
        ends - starts,
        np.r_[0, starts[1:] - ends[:-1]],
        np.array([round(1e6 * host[step.step]) if step.step in host else math.nan for step in steps], float),
        np.array([step.kind for step in steps], object),
        *(np.array([getattr(step, key) for step in steps], np.int64) for key in PACKED),
    )


def phase_medians_us(timeline: Timeline) -> dict[str, float]:
    """By name of the host spans ("plan", "wait", ...) the microseconds they take in a decode step: the median over the
    decode steps that have such a span. ValueError if the timeline has dropped steps."""
    timeline.check_whole("the median of each phase")
    decode = {step.step for step in timeline.steps if step.kind == "decode"}
    times: dict[str, dict[int, float]] = {}
    for span in timeline.spans:
        if span.lane == "host" and span.step in decode:
            of_name = times.setdefault(span.name, {})
            of_name[span.step] = of_name.get(span.step, 0.0) + span.end - span.start
    return {name: round(1e6 * statistics.median(of_name.values()), 1) for name, of_name in times.items()}


# ---- as a recording stores them -------------------------------------------------------------------------------------


def stored_form(steps: Steps) -> dict[str, Any]:
    """The steps as plain values for JSON; null for a host time that was not recorded."""
    kinds: list[list[Any]] = []  # [kind, number of steps in a row]
    for kind in steps.kind.tolist():
        if kinds and kinds[-1][0] == kind:
            kinds[-1][1] += 1
        else:
            kinds.append([kind, 1])
    return {
        "before_us": steps.before_us,
        "after_us": steps.after_us,
        "device_us": steps.device_us.tolist(),
        "gap_us": steps.gap_us.tolist(),
        "host_us": [None if value != value else int(value) for value in steps.host_us.tolist()],
        "kind": kinds,
        **{key: pack(getattr(steps, key).tolist()) for key in PACKED},
    }


def steps_of(run: dict[str, Any]) -> Steps:
    """The steps of one of a recording's `runs`, unpacked. ValueError if the columns differ in length."""
    stored = run["steps"]
    device, gap = (np.array(stored[key], np.int64) for key in ("device_us", "gap_us"))
    host = np.array([math.nan if value is None else value for value in stored["host_us"]], float)
    kinds = np.array([kind for kind, count in stored["kind"] for _ in range(count)], object)
    numbers = [np.array(unpack(stored[key]), np.int64) for key in PACKED]
    arrays = dict(zip(Steps._fields[2:], (device, gap, host, kinds, *numbers), strict=True))
    lengths = {key: len(array) for key, array in arrays.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"the lists of a run's steps differ in length: {lengths}")
    return Steps(stored["before_us"], stored["after_us"], device, gap, host, kinds, *numbers)


def pack(values: Sequence[int]) -> list[list[int]]:
    """Integers as arithmetic runs [first, increment, count]. The increment of a run of one is 0."""
    runs: list[list[int]] = []
    for value in map(int, values):
        if runs:
            first, increment, count = runs[-1]
            if count == 1:
                runs[-1] = [first, value - first, 2]
                continue
            if value == first + increment * count:
                runs[-1][2] += 1
                continue
        runs.append([value, 0, 1])
    return runs


def unpack(runs: Sequence[Sequence[int]]) -> list[int]:
    """The integers that `pack` made these runs of. ValueError if one is not such a run."""
    values: list[int] = []
    for run in runs:
        if len(run) != 3 or any(type(part) is not int for part in run) or run[2] < 1:
            raise ValueError(f"{run!r} is no arithmetic run [first, increment, count] of whole numbers, count from 1")
        first, increment, count = run
        values.extend([first + increment * place for place in range(count)])
    return values
