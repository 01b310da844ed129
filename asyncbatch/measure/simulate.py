"""What an asynchronous loop would bring, told from the times of a synchronous one.

A step costs the host `before` (plan, fill, launch), then the device a copy in, the step itself and a copy out, then the
host `commit`. The times form a loop of waits, and in the steady state a step takes as long as the slowest
cycle in it (the cycle mean of a max-plus system: Baccelli et al. 1992, "Synchronization and Linearity"):

    host      before + commit: the host's work, which nothing can hide from the host
    device    step (or a copy, should one be longer): the device's work
    slot      (before + copy in + step + copy out + commit) / slots: a slot is filled again only after its commit

One slot is the synchronous loop: the third cycle is the longest. With two slots, the third no longer counts as soon as
before, commit and both copies fit beside one step; then the device is never idle. More slots take away even that
condition, but not the first.

`simulate` follows the loop step by step, so steps may vary and the cold start and the end are counted; on the virtual
clock it is exact. `predict` feeds it with a synchronous run's timeline, on any clock. `what_if` takes one latency point
(`points.py`) away, or half of it, and follows both loops again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..timeline import Timeline, device_activity
from .points import CALLBACKS, NO_REQUEST, WAIT, seconds_by_step
from .recording import Recording, steps_of
from .text import table_line

HOST = ("plan", "fill", "launch", "commit")
WORTH_IT = 1.02  # a gain below this is lost in the noise of most machines


class StepCost(NamedTuple):
    """Seconds of one step: the host's (before: plan, fill and launch; commit) and the device's (copy_in, step,
    copy_out). `decode`: whether the step counts for active and idle. `hidden`: host work right after the launch, which
    the device does not wait for even in the synchronous loop."""

    before: float
    copy_in: float
    step: float
    copy_out: float
    commit: float
    decode: bool = True
    hidden: float = 0.0


@dataclass(frozen=True)
class Run:
    """One simulated run of N steps: when the device's steps start and end (float64 [N], seconds from the start), when
    the host is done, and the share of the decode steps in which the device is active (nan without any)."""

    slots: int
    starts: np.ndarray
    ends: np.ndarray
    total_s: float
    active: float

    @property
    def step_s(self) -> float:
        """Median time from the end of a step to the end of the next; nan with fewer than two steps."""
        return float(np.median(np.diff(self.ends))) if len(self.ends) > 1 else float("nan")


def simulate(costs: Sequence[StepCost], slots: int) -> Run:
    """Follow the loop with `slots` slots through the steps; 1 is the synchronous loop. ValueError for slots below 1."""
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
    for late in range(committed, len(costs)):
        host = max(host, outputs[late]) + costs[late].commit
    active_s, period_s = device_activity(starts, ends, [cost.decode for cost in costs]) if len(costs) > 1 else (0, 0)
    active = active_s / period_s if period_s > 0 else float("nan")
    return Run(slots, np.array(starts), np.array(ends), host, active)


def async_step_s(cost: StepCost, slots: int = 2) -> float:
    """The closed form: seconds a step takes in the steady state when all steps cost the same (see the top)."""
    host = cost.before + cost.hidden + cost.commit
    way = cost.before + cost.copy_in + cost.step + cost.copy_out + cost.commit
    return max(host, cost.step, cost.copy_in, cost.copy_out, way / slots)


def costs_of(timeline: Timeline, slots: int = 1) -> list[StepCost]:
    """The costs of each step, from its spans. What the device of a synchronous run (`slots` 1) waited beyond them (a
    host that had to wake up, time between two spans) counts as the host's, in `before`; what it did not wait of them
    (the rest of a launch, while the step runs) is `hidden`. Steps without a device span are left out."""
    seconds: dict[tuple[int, str], float] = {}
    for span in timeline.spans:
        seconds[span.step, span.name] = seconds.get((span.step, span.name), 0.0) + span.end - span.start
    found = []
    for step in timeline.steps:
        if (step.step, "step") in seconds:
            of = {name: seconds.get((step.step, name), 0.0) for name in (*HOST, "copy_in", "step", "copy_out")}
            before = of["plan"] + of["fill"] + of["launch"]
            device = of["copy_in"], of["step"], of["copy_out"]
            found.append(StepCost(before, *device, of["commit"], step.kind == "decode"))
    _, _, starts, ends = timeline.lane("compute")
    told = simulate(found, 1)
    if slots == 1 and len(starts) == len(found) > 1:
        missing = (starts[1:] - ends[:-1]) - (told.starts[1:] - told.ends[:-1])
        for number, more in enumerate(np.where(abs(missing) > 1e-9, missing, 0.0).tolist(), 1):
            before = max(found[number].before + more, 0.0)
            found[number] = found[number]._replace(before=before, hidden=max(-more, 0.0))
    return found


def costs_of_recording(run: dict[str, Any]) -> list[StepCost]:
    """The same of a run in a `Recording`, which keeps the device's steps and the gaps before them, in microseconds."""
    steps = steps_of(run)
    pairs = zip(steps.gap_us, steps.device_us, steps.kind, strict=True)
    return [StepCost(1e-6 * gap, 0.0, 1e-6 * device, 0.0, 0.0, kind == "decode") for gap, device, kind in pairs]


@dataclass(frozen=True)
class Prediction:
    """The synchronous run as its costs tell it, and what they say of the asynchronous one."""

    sync: Run
    asynchronous: Run
    host_s: float  # median of a step: what the host needs for it, and the copies
    device_s: float  # median time of a step on the device

    @property
    def gain(self) -> float:
        """Synchronous over asynchronous time."""
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

    early_stops: how many requests ended before their length limit, at a stop token or string. Each keeps its row for
    slots - 1 more steps (wasted tokens); with `rows` rows in a step on average, that takes so many more steps.
    Without early stops, and on the virtual clock, the prediction is exact.

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
    """The run with `factor` (0 or 0.5) of a latency point's time, `where` it is on the host or the device: seconds of
    both loops, and the share of each one's total that this saves."""

    point: str
    where: str
    factor: float
    sync_s: float
    async_s: float
    sync_saves: float
    async_saves: float


def what_if(timeline: Timeline, slots: int = 1, async_slots: int = 2) -> list[WhatIf]:
    """For each latency point of a run with `slots` slots: both loops' totals if it took no time, or half. First those
    of the host, then those of the device, each by what the loop that ran would save. Waiting is no point of its own:
    it is what the others leave. Empty where no step was measured."""
    costs = costs_of(timeline, slots)
    if not costs:
        return []
    computed = {span.step for span in timeline.spans if span.lane == "compute"}
    order = (step.step for step in timeline.steps if step.step in computed)  # as in `costs_of`
    place = {step: index for index, step in enumerate(order)}
    less: dict[tuple[str, str], np.ndarray] = {}  # (point, where): seconds [N, 5], as in StepCost

    def note(point: str, where: str, field: str, of_step: dict[int, float]) -> None:
        taken = less.setdefault((point, where), np.zeros((len(costs), 5)))
        for step, seconds in of_step.items():
            if step in place:
                taken[place[step], StepCost._fields.index(field)] += seconds

    host, device = seconds_by_step(timeline)
    for (point, after), of_step in host.items():
        # Between two turns of the asynchronous loop, the device is seldom waiting for the caller.
        if point not in (WAIT, NO_REQUEST) and not (point == CALLBACKS and slots > 1):
            note(point, "host", "commit" if after else "before", of_step)
    fields = {"copy in": "copy_in", "copy out": "copy_out"}
    for point, of_step in device.items():
        note(point, "device", fields.get(point, "step"), of_step)

    whole = np.array([cost[:5] for cost in costs])
    base = [simulate(costs, number).total_s for number in (1, async_slots)]
    found = []
    for (point, where), taken in less.items():
        for factor in (0.0, 0.5):
            left = np.maximum(whole - (1 - factor) * taken, 0.0).tolist()
            changed = [StepCost._make([*row, *cost[5:]]) for row, cost in zip(left, costs, strict=True)]
            totals = [simulate(changed, number).total_s for number in (1, async_slots)]
            saves = [1 - total / before if before else 0.0 for total, before in zip(totals, base, strict=True)]
            found.append(WhatIf(point, where, factor, *totals, *saves))
    ran = "sync_saves" if slots == 1 else "async_saves"
    best = {key: max(getattr(one, ran) for one in found if (one.point, one.where) == key) for key in less}
    return sorted(found, key=lambda one: (one.where == "device", -best[one.point, one.where], one.point, one.factor))


def main() -> int:
    """Predict each recorded asynchronous run from its synchronous one, and print how far off that was."""
    head = ("recording", "engine", "model", "batch", "sync", "predicted", "async", "error")
    widths, align = (18, 14, 20, 6, 10, 11, 10, 8), "<<<>"
    print(table_line(head, widths, align))
    for name in Recording.names():
        runs = {(r["engine"], r["model"], r["batch_size"], r["mode"]): r for r in Recording.load(name).runs}
        for (engine, model, batch, mode), run in runs.items():
            other = runs.get((engine, model, batch, "async"))
            if mode == "sync" and other:
                guess, real_s = predict(costs_of_recording(run)), span_s(other)
                totals = [f"{total_s:.3f}s" for total_s in (guess.sync.total_s, guess.asynchronous.total_s, real_s)]
                error = f"{guess.asynchronous.total_s / real_s - 1:+.1%}"
                print(table_line((name, engine, model, batch, *totals, error), widths, align))
    return 0


def span_s(run: dict[str, Any]) -> float:
    """Seconds from the start of a recorded run's first step to the end of its last one."""
    steps = steps_of(run)
    return 1e-6 * (sum(steps.device_us) + sum(steps.gap_us))
