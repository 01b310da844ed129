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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..timeline import Timeline, device_activity
from .points import CALLBACKS, NO_REQUEST, WAIT, seconds_by_step
from .recording import Recording
from .steps import steps_of
from .text import table_line

HOST = ("plan", "fill", "launch", "commit")
WORTH_IT = 1.02  # on most machines a smaller gain is lost in the noise


class StepCost(NamedTuple):
    """Seconds of one step: on the host (before: plan, fill and launch; commit) and on the device (copy_in, step,
    copy_out). `decode`: whether the step counts for active and idle. `hidden`: seconds of host work right after the
    launch, for which the device does not wait even in the synchronous loop."""

    before: float
    copy_in: float
    step: float
    copy_out: float
    commit: float
    decode: bool = True
    hidden: float = 0.0


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
        host += cost.hidden
        starts.append(max(step_end, copied_in))
        step_end = starts[-1] + cost.step
        copied_out = max(copied_out, step_end) + cost.copy_out
        ends.append(step_end)
        outputs.append(copied_out)
        if number - committed + 1 == slots:
            host = max(host, outputs[committed]) + costs[committed].commit
            committed += 1
    for last in range(committed, len(costs)):  # at the end, the steps still in flight
        host = max(host, outputs[last]) + costs[last].commit
    active_s, period_s = device_activity(starts, ends, [cost.decode for cost in costs]) if len(costs) > 1 else (0, 0)
    active = active_s / period_s if period_s > 0 else float("nan")
    return SimulatedRun(slots, np.array(starts), np.array(ends), host, active)


def costs_of(timeline: Timeline, slots: int = 1) -> list[StepCost]:
    """The costs of each step that has a span on the device, from its spans.

    slots: how many the run had. With 1 (a synchronous run) the idle times of the device are those of the timeline. What
    the device waited beyond the spans (a host that had to wake up, time between two spans) is added to `before`; what
    of the spans it did not wait for (the rest of a launch, while the step runs) becomes `hidden`. ValueError if the
    timeline has dropped steps."""
    timeline.check_whole("a prediction")
    seconds: dict[tuple[int, str], float] = {}
    for span in timeline.spans:
        seconds[span.step, span.name] = seconds.get((span.step, span.name), 0.0) + span.end - span.start
    costs = []
    for step in timeline.steps:
        if (step.step, "step") in seconds:
            of = {name: seconds.get((step.step, name), 0.0) for name in (*HOST, "copy_in", "step", "copy_out")}
            before = of["plan"] + of["fill"] + of["launch"]
            device = of["copy_in"], of["step"], of["copy_out"]
            costs.append(StepCost(before, *device, of["commit"], step.kind == "decode"))
    _, _, starts, ends = timeline.lane("compute")
    run = simulate(costs, 1)
    if slots == 1 and len(starts) == len(costs) > 1:
        unexplained = (starts[1:] - ends[:-1]) - (run.starts[1:] - run.ends[:-1])
        for number, more in enumerate(np.where(abs(unexplained) > 1e-9, unexplained, 0.0).tolist(), 1):
            before = max(costs[number].before + more, 0.0)
            costs[number] = costs[number]._replace(before=before, hidden=max(-more, 0.0))
    return costs


def costs_of_recording(run: dict[str, Any]) -> list[StepCost]:
    """The costs of each step of a run in a `Recording`. It has the steps on the device and the gaps before them only,
    so each gap counts as `before`."""
    steps = steps_of(run)
    pairs = zip(steps.gap_us, steps.device_us, steps.kind, strict=True)
    return [StepCost(1e-6 * gap, 0.0, 1e-6 * device, 0.0, 0.0, kind == "decode") for gap, device, kind in pairs]


@dataclass(frozen=True)
class Prediction:
    """Both runs simulated from the same costs. host_s, device_s: medians over the steps, in seconds, of the host's work
    with both copies, and of the step on the device."""

    sync: SimulatedRun
    asynchronous: SimulatedRun
    host_s: float
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
        times = f"{1e3 * self.host_s:.3f} ms of host work and copies beside {1e3 * self.device_s:.3f} ms on the device"
        if not self.helps:
            meaning = f"It will not help: there are only {times} to hide."
        elif self.host_s > self.device_s:
            meaning = f"It helps, but the host is the slower one ({times}), so the device still waits in every step."
        else:
            meaning = f"It helps: {times}, so the host's work disappears behind the device's."
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
    host = float(np.median([cost.before + cost.copy_in + cost.copy_out + cost.commit for cost in costs]))
    device = float(np.median([cost.step for cost in costs]))
    more = [costs[len(costs) // 2]] * round(early_stops * (slots - 1) / rows)
    return Prediction(simulate(costs, 1), simulate([*costs, *more], slots), host, device)


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
    loop that ran. Waiting is not among them: it is what the other points leave. Empty where no step was measured."""
    costs = costs_of(timeline, slots)
    if not costs:
        return []
    times = np.array([cost[:5] for cost in costs])
    base = [simulate(costs, number).total_s for number in (1, async_slots)]
    removable = _seconds_in_costs(timeline, slots)
    rows = []
    for (point, where), seconds in removable.items():
        for factor in (0.0, 0.5):
            remaining = np.maximum(times - (1 - factor) * seconds, 0.0).tolist()
            new_costs = [StepCost._make([*row, *cost[5:]]) for row, cost in zip(remaining, costs, strict=True)]
            totals = [simulate(new_costs, number).total_s for number in (1, async_slots)]
            saves = [1 - total / before if before else 0.0 for total, before in zip(totals, base, strict=True)]
            rows.append(WhatIf(point, where, factor, *totals, *saves))
    ran = "sync_saves" if slots == 1 else "async_saves"
    best = {key: max(getattr(row, ran) for row in rows if (row.point, row.where) == key) for key in removable}
    return sorted(rows, key=lambda row: (row.where == "device", -best[row.point, row.where], row.point, row.factor))


def _seconds_in_costs(timeline: Timeline, slots: int) -> dict[tuple[str, str], np.ndarray]:
    """By (point, "host" or "device") how many seconds the point has in each cost: float64 [N, 5], N as in `costs_of`,
    and the columns are the first five fields of `StepCost`."""
    on_device = {span.step for span in timeline.spans if span.lane == "compute"}
    order = [step.step for step in timeline.steps if step.step in on_device]  # as in `costs_of`
    place = {step: index for index, step in enumerate(order)}
    seconds_in: dict[tuple[str, str], np.ndarray] = {}

    def add(point: str, where: str, field: str, of_step: dict[int, float]) -> None:
        seconds_of_point = seconds_in.setdefault((point, where), np.zeros((len(order), 5)))
        for step, seconds in of_step.items():
            if step in place:
                seconds_of_point[place[step], StepCost._fields.index(field)] += seconds

    host, device = seconds_by_step(timeline)
    for (point, after), of_step in host.items():
        # Between two turns of the asynchronous loop, the device is seldom waiting for the caller.
        if point not in (WAIT, NO_REQUEST) and not (point == CALLBACKS and slots > 1):
            add(point, "host", "commit" if after else "before", of_step)
    fields = {"copy in": "copy_in", "copy out": "copy_out"}
    for point, of_step in device.items():
        add(point, "device", fields.get(point, "step"), of_step)
    return seconds_in


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
