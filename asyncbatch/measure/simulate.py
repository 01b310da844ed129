"""What an asynchronous loop would bring, predicted from the times of a synchronous one.

A step takes the host `before` (plan, fill, launch), then the device a copy in, the step itself and a copy out, then the
host `commit`. Each of these waits for others, in a circle. In the steady state a step takes as long as the slowest of
three cycles (the cycle mean of a max-plus system: Baccelli et al. 1992, "Synchronization and Linearity"):

    host      before + commit: the host's work, which nothing can hide from the host
    device    step (or a copy, should one be longer): the device's work
    slot      (before + copy in + step + copy out + commit) / slots: a slot is filled again only after its commit

With one slot, the synchronous loop, the third cycle is the longest. With two slots it no longer matters once `before`,
`commit` and both copies together take no longer than one step; if the host cycle is shorter than a step too, the device
is never idle. More slots remove the third condition altogether, but not the first.

`simulate` follows the loop step by step, so steps may differ, and the cold start and the end are counted; on the
virtual clock it is exact. `predict` does this with the costs of a synchronous run, on any clock. `what_if` removes one
latency point (`points.py`), or half of it, and follows both loops again.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..timeline import Timeline, device_activity
from .moments import Moments, moments_of
from .points import NO_REQUEST, NOT_BEGUN, WAIT, WAKING, host_segments, seconds_by_step
from .recording import Recording
from .steps import steps_of
from .text import table_line

WORTH_IT = 1.02  # on most machines a smaller gain is lost in the noise


class StepCost(NamedTuple):
    """Seconds of one step: on the host (before: until the copy in is launched; commit) and on the device (copy_in,
    step, copy_out). `decode`: whether the step counts for active and idle.

    Of the host, more: `between` the launch of the copy and that of the step; `hidden` after that, within the launch,
    for which the device does not wait even in the synchronous loop; `waking` up, where it had to wait for the results.
    `begin`: what the device takes to begin a step that has been launched and has its inputs, where it is idle."""

    before: float
    copy_in: float
    step: float
    copy_out: float
    commit: float
    decode: bool = True
    hidden: float = 0.0
    between: float = 0.0
    waking: float = 0.0
    begin: float = 0.0


@dataclass(frozen=True)
class SimulatedRun:
    """A run of N steps with `slots` slots. starts, ends: float64 [N], seconds from the beginning at which each step
    starts and ends on the device. total_s: when the host is done. active: the share of time in which the device is
    active, over the decode steps (nan where no decode step has a period)."""

    slots: int
    starts: np.ndarray
    ends: np.ndarray
    total_s: float
    active: float

    @property
    def step_s(self) -> float:
        """Median seconds from the end of one step to the end of the next; nan with fewer than two steps."""
        return float(np.median(np.diff(self.ends))) if len(self.ends) > 1 else float("nan")


def simulate(costs: Sequence[StepCost], slots: int) -> SimulatedRun:
    """Follow the loop through steps of these costs. slots: 1 is the synchronous loop. ValueError for slots below 1."""
    if slots < 1:
        raise ValueError(f"slots is {slots}: allowed are whole numbers from 1")
    host = copied_in = step_end = copied_out = 0.0
    starts, ends, outputs = [], [], []
    committed = 0
    for number, cost in enumerate(costs):
        host += cost.before
        # Three streams, each in order: a step waits for its inputs and for the step before it.
        copied_in = max(copied_in, host) + cost.copy_in
        host += cost.between
        starts.append(max(step_end, max(copied_in, host) + cost.begin))
        step_end = starts[-1] + cost.step
        host += cost.hidden
        copied_out = max(copied_out, step_end, host) + cost.copy_out
        ends.append(step_end)
        outputs.append(copied_out + cost.waking)
        if number - committed + 1 == slots:
            host = max(host, outputs[committed]) + costs[committed].commit
            committed += 1
    for last in range(committed, len(costs)):  # at the end, the steps still in flight
        host = max(host, outputs[last]) + costs[last].commit
    active_s, period_s = device_activity(starts, ends, [cost.decode for cost in costs]) if len(costs) > 1 else (0, 0)
    active = active_s / period_s if period_s > 0 else float("nan")
    return SimulatedRun(slots, np.array(starts), np.array(ends), host, active)


def costs_of(timeline: Timeline) -> list[StepCost]:
    """The costs of each step that has a span on the device, from its moments (`moments.py`).

    All of the host's time has its place, that of no span too. A simulation with the slots that the run had is the run
    itself: its totals and its idle times. ValueError if the timeline has dropped steps."""
    return _costs(moments_of(timeline))


def _costs(moments: Sequence[Moments]) -> list[StepCost]:
    costs = []
    copied_in = copied_out = -math.inf
    for one in moments:
        (start, end), in_end, out_end = one.computed, one.copy_in[1], one.copy_out[1]
        output_at = max(copied_out, end, one.launch_end)
        costs.append(
            StepCost(
                before=one.copy_launched - one.free,
                copy_in=max(in_end - max(copied_in, one.copy_launched), 0.0),
                step=end - start,
                copy_out=max(out_end - output_at, 0.0),
                commit=one.committed - one.waited[1],
                decode=one.kind == "decode",
                hidden=one.launch_end - one.launched,
                between=one.launched - one.copy_launched,
                waking=max(one.waited[1] - max(out_end, output_at, one.waited[0]), 0.0),
                begin=max(start - max(one.ready, in_end, one.launched), 0.0),
            )
        )
        copied_in, copied_out = max(copied_in, in_end), max(copied_out, out_end)
    return costs


def costs_of_recording(run: dict[str, Any]) -> list[StepCost]:
    """The costs of each step of a run in a `Recording`. It has the steps on the device and the gaps before them only,
    so each gap counts as `before`."""
    steps = steps_of(run)
    pairs = zip(steps.gap_us, steps.device_us, steps.kind, strict=True)
    return [StepCost(1e-6 * gap, 0.0, 1e-6 * device, 0.0, 0.0, kind == "decode") for gap, device, kind in pairs]


@dataclass(frozen=True)
class Prediction:
    """Both runs simulated from the same costs. Medians over the steps, in seconds: host_s, the host's work; between_s,
    what lies between two steps in the synchronous loop (host work that is not hidden, copies, waking up, beginning);
    device_s, the step on the device."""

    sync: SimulatedRun
    asynchronous: SimulatedRun
    host_s: float
    between_s: float
    device_s: float

    @property
    def gain(self) -> float:
        """How many times as fast the asynchronous run is."""
        return self.sync.total_s / self.asynchronous.total_s

    @property
    def helps(self) -> bool:
        return self.gain >= WORTH_IT

    def __str__(self) -> str:
        sync, other = self.sync, self.asynchronous
        times = f"{1e3 * self.between_s:.3f} ms between two steps of {1e3 * self.device_s:.3f} ms on the device"
        if not self.helps:
            meaning = f"It will not help: there are only {times} to hide."
        elif self.host_s > self.device_s:
            meaning = f"It helps, but the host works longer than the device ({times}), which still waits in every step."
        else:
            meaning = f"It helps: {times}, and what lies between them disappears behind the device's work."
        return (
            f"synchronous:  {sync.total_s:.3f} s, device active {sync.active:.1%}\n"
            f"asynchronous: {other.total_s:.3f} s predicted ({self.gain:.3f}x), device active {other.active:.1%}\n"
            f"{meaning}"
        )


def predict(costs: Sequence[StepCost], slots: int = 2, early_stops: int = 0, rows: float = 1.0) -> Prediction:
    """Predict the asynchronous run with `slots` slots from the costs of a synchronous one.

    early_stops: how many requests ended before their length limit, at a stop token or a stop string. Each of them keeps
    its row for slots - 1 more steps, with wasted tokens. rows: rows in a step, on average; the more there are, the
    fewer additional steps the run needs for that.
    On the virtual clock, without early stops, the prediction is exact.

    ValueError without any step, or for slots, early_stops or rows that make no sense."""
    if not costs:
        raise ValueError("there is no step to predict from: it takes a synchronous run with device times")
    if early_stops < 0 or rows < 1:
        raise ValueError(f"early_stops is {early_stops} and rows {rows}: allowed are from 0, and from 1")
    columns = StepCost._make(np.array(costs, float).T)
    host = columns.before + columns.between + columns.commit
    between = host + columns.copy_in + columns.begin + columns.copy_out + columns.waking
    medians = (float(np.median(each)) for each in (host + columns.hidden, between, columns.step))
    more = [costs[len(costs) // 2]] * round(early_stops * (slots - 1) / rows)
    return Prediction(simulate(costs, 1), simulate([*costs, *more], slots), *medians)


class WhatIf(NamedTuple):
    """What would be if the latency point `point` took only `factor` (0 or 0.5) of its time.

    where: "host" or "device", the side that the point is on. sync_s, async_s: seconds of the whole run in both loops.
    sync_saves, async_saves: the share of that loop's total that this saves."""

    point: str
    where: str
    factor: float
    sync_s: float
    async_s: float
    sync_saves: float
    async_saves: float


def what_if(timeline: Timeline, slots: int = 1, async_slots: int = 2) -> list[WhatIf]:
    """For each latency point of a run with `slots` slots: the totals of both loops if it took no time, or half.

    Points of the host come first, then those of the device; on each side the first is the one that saves most in the
    loop that ran. Waiting is not among them: it is what the other points leave. But what the device takes to begin, and
    the host to wake up, is. Empty where no step was measured."""
    moments = moments_of(timeline)
    if not moments:
        return []
    costs = _costs(moments)
    times = np.array(costs, float)
    base = [simulate(costs, number).total_s for number in (1, async_slots)]
    removable = _seconds_in_costs(timeline, moments, costs)
    rows = []
    for (point, where), seconds in removable.items():
        for factor in (0.0, 0.5):
            remaining = np.maximum(times - (1 - factor) * seconds, 0.0).tolist()
            new_costs = [StepCost._make(row) for row in remaining]
            totals = [simulate(new_costs, number).total_s for number in (1, async_slots)]
            saves = [1 - total / before if before else 0.0 for total, before in zip(totals, base, strict=True)]
            rows.append(WhatIf(point, where, factor, *totals, *saves))
    ran = "sync_saves" if slots == 1 else "async_saves"
    best = {key: max(getattr(row, ran) for row in rows if (row.point, row.where) == key) for key in removable}
    return sorted(rows, key=lambda row: (row.where == "device", -best[row.point, row.where], row.point, row.factor))


def _seconds_in_costs(
    timeline: Timeline, moments: Sequence[Moments], costs: Sequence[StepCost]
) -> dict[tuple[str, str], np.ndarray]:
    """By (point, "host" or "device") how many seconds the point has in each cost: float64 [N, 10], a row for each of
    `moments` and a column for each field of `StepCost`."""
    place = {one.step: index for index, one in enumerate(moments)}
    seconds_in: dict[tuple[str, str], np.ndarray] = {}

    def add(point: str, where: str, field: str, row: int, seconds: float) -> None:
        if seconds > 0:
            of_point = seconds_in.setdefault((point, where), np.zeros((len(moments), len(StepCost._fields))))
            of_point[row, StepCost._fields.index(field)] += seconds

    for point, row, field, seconds in _host_seconds(timeline, moments, place):
        if point not in (WAIT, NO_REQUEST):
            add(point, "host", field, row, seconds)
    fields = {"copy in": "copy_in", "copy out": "copy_out"}
    for point, of_step in seconds_by_step(timeline)[1].items():
        for step in of_step.keys() & place.keys():
            add(point, "device", fields.get(point, "step"), place[step], of_step[step])
    copied = -math.inf
    for row, (one, cost) in enumerate(zip(moments, costs, strict=True)):
        add(WAKING, "host", "waking", row, cost.waking)
        add(NOT_BEGUN, "device", "begin", row, cost.begin)
        add(NOT_BEGUN, "device", "copy_in", row, one.copy_in[0] - max(copied, one.copy_launched))
        copied = max(copied, one.copy_in[1])
    return seconds_in


def _host_seconds(
    timeline: Timeline, moments: Sequence[Moments], place: dict[int, int]
) -> Iterator[tuple[str, int, str, float]]:
    """(point, row, field, seconds): each stretch of the host's time, cut where a step's launching and its hiding begin.
    Time between two turns belongs to the step that is launched next."""
    by_launch = sorted(range(len(moments)), key=lambda row: moments[row].launch_end)
    ends = [moments[row].launch_end for row in by_launch]
    for name, step, start, end, after in host_segments(timeline):
        if after:
            if step in place:
                yield name, place[step], "commit", end - start
            continue
        next_launch = bisect.bisect_right(ends, start)
        if next_launch == len(ends):
            continue  # after the last launch: no step waits for it
        row = by_launch[next_launch]
        one = moments[row]
        cuts = (one.free, one.copy_launched, one.launched, one.launch_end)
        for field, low, high in zip(("before", "between", "hidden"), cuts, cuts[1:], strict=False):
            yield name, row, field, min(end, high) - max(start, low)


def main() -> int:
    """Predict each recorded asynchronous run from the synchronous one beside it, and print how far off that was."""
    head = ("recording", "engine", "model", "batch", "sync", "predicted", "async", "error")
    widths, align = (18, 14, 20, 6, 10, 11, 10, 8), "<<<>"
    print(table_line(head, widths, align))
    for name in Recording.names():
        runs = {(r["engine"], r["model"], r["batch_size"], r["mode"]): r for r in Recording.load(name).runs}
        for (engine, model, batch, mode), run in runs.items():
            other = runs.get((engine, model, batch, "async"))
            if mode == "sync" and other:
                prediction, real_s = predict(costs_of_recording(run)), span_s(other)
                sync_s, async_s = prediction.sync.total_s, prediction.asynchronous.total_s
                totals = [f"{total_s:.3f}s" for total_s in (sync_s, async_s, real_s)]
                print(table_line((name, engine, model, batch, *totals, f"{async_s / real_s - 1:+.1%}"), widths, align))
    return 0


def span_s(run: dict[str, Any]) -> float:
    """Seconds from the start of a recorded run's first step to the end of its last one."""
    steps = steps_of(run)
    return 1e-6 * (sum(steps.device_us) + sum(steps.gap_us))
